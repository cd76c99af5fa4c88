"""What one iteration of online training costs, in forwards of the denoiser: images drawn, judged and learnt from.

    python benchmarks/online_step.py                    # a small Stable Diffusion on the CPU, three minutes
    python benchmarks/online_step.py --preset sd15 --device cuda --dtype bfloat16 --variants again half

An iteration is 8 images of 5 steps under guidance, and one update of a LoRA, by the package's own trainers and loop.
The unit U is one forward of the bare denoiser for one image, timed between the iterations (on the CPU in processor
seconds), so that the cost depends little on the machine. It is taken in batches of 8 images, as they are drawn; alone
an image is dearer, so that the same cost looks smaller: that is printed too.

Beside it stands what the counted calls alone would cost, each at its own measured price: what is above is the package.
The networks are real and random: weights do not change what an iteration costs. A kept graph of SD 1.5 takes 3.7 GiB
in bfloat16 for every image and step.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Any, Literal, cast

import torch
from dpo_step import PRESETS as SIZES
from dpo_step import build
from instruments import Calls, GraphMemory, UnitClock, forget_peak_memory, peak_memory_gib, prices
from torch import Tensor, nn

from rpo.models.checkpoint import Checkpoint
from rpo.trainers.grpo import GRPO
from rpo.trainers.grpo_config import GRPOConfig
from rpo.trainers.rollouts.algorithm import OnlineAlgorithm
from rpo.trainers.rollouts.settings import OnlineLearningConfig, RolloutConfig, StepsConfig
from rpo.trainers.score_as_action import ScoreAsAction
from rpo.trainers.score_as_action_config import ScoreAsActionConfig
from rpo.trainers.settings import AdapterConfig
from rpo.trainers.trainer import Trainer
from rpo.trainers.value.settings import ValueConfig
from rpo.training.loop import fit

PRESETS: dict[str, dict[str, Any]] = {
    **SIZES,
    "tiny": {"channels": (32, 64), "layers": 1, "text": (64, 1), "vae": (32, 32, 32, 32), "resolution": 64},
}
PROMPTS = ["a red circle", "a blue square"]
IMAGES, STEPS, GUIDANCE, RANK = 8, 5, 5.0, 4
WARM_UP = 1  # iteration that is not timed
GRADIENT_TOLERANCE = 1e-4  # of its length, in float32
MIB = 2**20


@dataclass(frozen=True)
class Variant:
    """A way to learn from the same rollout."""

    what: str
    steps: StepsConfig
    method: Literal["grpo", "score_as_action"] = "grpo"
    target: float | None = None
    """What it may cost, in U."""


HALF = (STEPS + 1) // 2
VARIANTS = {
    "ddpo": Variant(
        "DDPO's gradient as usual: both branches, computed again",
        StepsConfig(freeze_negative=False),
    ),
    "keep": Variant(
        "the same gradient from the graph of the rollout",
        StepsConfig(freeze_negative=False, keep_graph=True),
        target=229.0,
    ),
    "frozen": Variant(
        "the same without the negative branch", StepsConfig(freeze_negative=True, keep_graph=True), target=190.0
    ),
    "again": Variant("the same gradient computed again, for little memory", StepsConfig(freeze_negative=True)),
    "half": Variant(
        f"as frozen, at {HALF} of {STEPS} time points",
        StepsConfig(freeze_negative=True, keep_graph=True, train_steps=HALF),
    ),
    "score": Variant(
        "as frozen, by score as action with its V",
        StepsConfig(freeze_negative=True, keep_graph=True),
        "score_as_action",
    ),
}


def make_trainer(model: Checkpoint, variant: Variant, folder: str, updates: int) -> Trainer:
    """The package's trainer of a variant."""
    settings: dict[str, Any] = {
        "rollout": RolloutConfig(
            prompts=len(PROMPTS),
            images_per_prompt=IMAGES // len(PROMPTS),
            num_steps=STEPS,
            guidance_scale=GUIDANCE,
            batch_size=IMAGES,
        ),
        "steps": variant.steps,
        "adapter": AdapterConfig(rank=RANK),
        "preview_every": 0,
        "preflight": False,
        "output": folder,
        "learning": OnlineLearningConfig(
            updates=updates, checkpoint_every=updates, learning_rate=1e-5, micro_batch=IMAGES, progress=False
        ),
    }
    if variant.method == "grpo":
        return Trainer(model, GRPO("jpeg-compressibility", PROMPTS, GRPOConfig(**settings)))
    value = ValueConfig(uses_reward=False, sees_latents=True, pretrain_rollouts=0)
    config = ScoreAsActionConfig(**settings, value=value)
    return Trainer(model, ScoreAsAction("jpeg-compressibility", PROMPTS, config))


def without_watching(trainer: Trainer) -> None:
    """Leave out the KL that is only logged: what it costs is no part of the method."""
    zero = torch.zeros((), device=trainer.run.model.device)
    algorithm = cast(OnlineAlgorithm, trainer.algorithm)
    algorithm.collector.measured_kl = lambda rollout: zero


@contextmanager
def moved(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, an adapter that has left its start, where one of its factors has no gradient."""
    generator, start = torch.Generator().manual_seed(0), [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
        with torch.enable_grad():
            yield
        for parameter, value in zip(parameters, start, strict=True):
            parameter.copy_(value)


def gradient(trainer: Trainer) -> tuple[Tensor, list[int]]:
    """The gradient of the first update, and the bytes kept for backward: at most, then after each micro-batch."""
    run, algorithm, accumulate = trainer.run, trainer.algorithm, trainer.algorithm.division[1]
    memory = GraphMemory(run.model.denoiser.parameters())
    left: list[int] = []
    with moved(run.policy.parameters), memory.watch():
        for steps in islice(algorithm.batches(0), accumulate):
            (algorithm.loss(steps).loss / accumulate).backward()
            left.append(memory.bytes)
    parameters = run.policy.parameters
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
    for parameter in parameters:
        parameter.grad = None
    return flat, [memory.peak, *left]


def iterate(trainer: Trainer, clock: UnitClock, calls: Calls) -> None:
    """Run the trainer's updates through the package's loop, the clock between them; what warms up does not count."""
    algorithm = trainer.algorithm

    def between(update: int, _: object) -> None:
        if update == WARM_UP:
            calls.counts.clear()
        with calls.counting(is_on=False):
            clock.lap()

    clock.start()
    with calls.counting():
        fit(
            algorithm.batches,
            algorithm.loss,
            trainer.run.policy.parameters,
            trainer.loop,
            folder=trainer.folder,
            names=algorithm.names,
            state=algorithm.state,
            on_update=between,
        )


def measure(model: Checkpoint, variant: Variant, calls: Calls, repeats: int) -> tuple[dict[str, Any], Tensor]:
    """One line of the table, and the gradient of the first update."""
    updates = repeats + WARM_UP
    forget_peak_memory(model.device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, variant, folder, updates)
        without_watching(trainer)
        slope, kept = gradient(trainer)
        clock = UnitClock(model, images=IMAGES)
        iterate(trainer, clock, calls)
    model.pipe.unload_lora_weights()
    counts = {name: calls.counts[name] / repeats for name in sorted(calls.counts)}
    line = {
        "what": variant.what,
        "units": round(clock.in_units(WARM_UP), 1),
        "target": variant.target,
        "units_of_an_image_alone": round(clock.in_units(WARM_UP, alone=True), 1),
        "seconds": round(median(clock.seconds[WARM_UP:]), 3),
        "counts": counts,
        "graph_mib": [round(size / MIB, 1) for size in kept],
        "peak_memory_gib": round(peak_memory_gib(model.device), 3),
    }
    return line, slope


def calls_alone(counts: dict[str, float], price: dict[str, float]) -> float:
    """What the counted calls cost by their own prices, with nothing around them."""
    rows = {name: counts.get(f"{name}_images", 0.0) for name in price}
    rows["forward"] -= rows["forward_with_graph"]
    return sum(rows[name] * price[name] for name in price)


def problems(report: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    found = [
        f"{name} costs {line['units']} U, more than its {line['target']} U"
        for name, line in report["variants"].items()
        if line["target"] is not None and line["units"] > line["target"]
    ]
    difference = report["gradient_difference"]
    if report["dtype"] == "float32" and difference is not None and not difference < GRADIENT_TOLERANCE:
        found.append(f"the gradients of ddpo and keep differ by {difference:.2g}, more than {GRADIENT_TOLERANCE:g}")
    return found


def table(report: dict[str, Any]) -> str:
    """The report for a person."""
    columns = ("U", "target", "U alone", "calls", "seconds", "forwards", "graph", "back", "decodes", "graph MiB", "GiB")
    lines = [" " * 8 + "".join(f"{column:>10}" for column in columns)]
    for name, line in report["variants"].items():
        counts = line["counts"]
        cells = [
            line["units"],
            line["target"] or "",
            line["units_of_an_image_alone"],
            line["calls_alone_units"],
            line["seconds"],
            *(counts[f"{kind}_images"] for kind in ("forward", "forward_with_graph", "backward", "decode")),
            line["graph_mib"][0],
            line["peak_memory_gib"],
        ]
        lines += [f"{name:8}" + "".join(f"{cell:>10}" for cell in cells) + f"  {line['what']}"]
    price = ", ".join(f"{name.replace('_', ' ')} {units:.2f}" for name, units in report["prices"].items())
    difference = report["gradient_difference"]
    return "\n".join(
        [
            f"{report['preset']} at {report['resolution']} px, {report['dtype']} on {report['device']}: one iteration "
            f"of {IMAGES} images, {STEPS} steps, guidance {GUIDANCE:g}, LoRA of rank {RANK}",
            *lines,
            f"one image in U: {price}",
            *([] if difference is None else [f"gradients of ddpo and keep differ by {difference:.2g} of their length"]),
        ]
    )


def main() -> None:
    """Measure, print, and with `--check` fail when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--repeats", type=int, default=5, help="timed iterations of each variant")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; more than one wastes processor time")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = build(PRESETS[args.preset], getattr(torch, args.dtype), args.device)
    price = prices(model, images=IMAGES, rank=RANK, repeats=args.repeats)
    calls = Calls(model)
    lines, gradients = {}, {}
    for name in args.variants:
        lines[name], gradients[name] = measure(model, VARIANTS[name], calls, args.repeats)
        lines[name]["calls_alone_units"] = round(calls_alone(lines[name]["counts"], price), 1)
    difference = None
    if "ddpo" in gradients and "keep" in gradients:
        difference = float((gradients["ddpo"] - gradients["keep"]).norm() / gradients["ddpo"].norm())
    report = {
        "preset": args.preset,
        "resolution": PRESETS[args.preset]["resolution"],
        "device": "cpu" if args.device == "cpu" else torch.cuda.get_device_name(),
        "dtype": args.dtype,
        "threads": args.threads,
        "prices": price,
        "variants": lines,
        "gradient_difference": difference,
    }
    print(json.dumps(report, indent=2) if args.json else table(report))
    found = problems(report)
    if args.check and found:
        raise SystemExit("\n".join(f"missed: {problem}" for problem in found))


if __name__ == "__main__":
    main()
