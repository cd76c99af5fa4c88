"""Score as action against GRPO and DDPO on `shapes`, at equal cost in denoiser evaluations.

    python benchmarks/online_rl.py compare            # three seeds each; tables and figure
    python benchmarks/online_rl.py rates              # GRPO and DDPO at three times the rate, one seed
    python benchmarks/online_rl.py report             # from what is finished so far

Every run starts from the embedded checkpoint, sees the same prompts and is told the graded verdict of the verifier. One
evaluation is one latent through the denoiser, forward or backward; rollouts, training and the watched KL all count.

A sampler can be worth as much as training is: without guidance, 20 ancestral steps draw 17 points more of the base's
images right than 20 deterministic ones do. So every model, the base too, is judged by every sampler of `SAMPLERS`,
among them the one that its rollouts were drawn by (even steps, eta 1, guidance 2), and by the best of them as training
prompts tell it. Gains are those over the base at *its* best, and by one sampler that is good for it, by which runs are
also judged on their way.

The KL from the base is that of paths of the reverse SDE in 10 steps without guidance, for every method the same; that
of the last two stands apart. Each seed is a process on one core that continues where it was killed: start the command
again. Everything lies in one folder; `results.json` has every number of the tables and every verdict.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jobs import on_one_core, write
from online_rl_report import SAMPLERS, STOPS, WATCHED, report
from torch import nn

from rpo.adapters.lora import reference
from rpo.config.load import load_config
from rpo.models.checkpoint import Checkpoint
from rpo.process.transition import Ddim
from rpo.runs.train_config import EndpointRunConfig, GRPORunConfig, part_of
from rpo.sampling.sample import image_generator, sample
from rpo.sampling.step import predict, transition
from rpo.shapes.evaluate import evaluate, held_out_prompts
from rpo.shapes.prompts import Prompt, sample_prompts
from rpo.trainers.endpoint import Endpoint
from rpo.trainers.endpoint_config import EndpointConfig
from rpo.trainers.grpo import GRPO
from rpo.trainers.grpo_config import GRPOConfig
from rpo.trainers.trainer import Trainer
from rpo.training.log import read_metrics

CONFIGS = Path(__file__).parent.parent / "configs"
TRAIN_PROMPTS = 512
"""An equal share of each kind of prompt."""
TRAINED_STEPS = 10
LAST_STEPS = 2


@dataclass(frozen=True)
class Method:
    """One way to train: a trainer and what its settings are, beside those of the shapes configuration."""

    title: str
    algorithm: str
    overrides: tuple[str, ...] = ()


METHODS = {
    "endpoint": Method("score as action by endpoints", "endpoint"),
    "grpo": Method("GRPO", "grpo"),
    "ddpo": Method("DDPO", "grpo", ("baseline=prompt_history",)),
    "grpo_fast": Method("GRPO, rate 1e-3", "grpo", ("learning.learning_rate=1e-3",)),
    "ddpo_fast": Method("DDPO, rate 1e-3", "grpo", ("baseline=prompt_history", "learning.learning_rate=1e-3")),
}
PARTS = {"compare": ("endpoint", "grpo", "ddpo"), "rates": ("grpo_fast", "ddpo_fast")}


class Evaluations:
    """Counts latents through a denoiser, forward and (where a graph is made) backward."""

    def __init__(self, network: nn.Module):
        """Start at 0; `count` grows with every call of the network."""
        self.count = 0
        network.register_forward_hook(self._add, with_kwargs=True)

    def _add(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.count += len(args[0]) * (2 if torch.is_grad_enabled() else 1)


def train(method: Method, seed: int, budget: int, images: int, folder: Path) -> None:
    """One run, judged at every stop; continues where an earlier call ended."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    prompts = [prompt.text for prompt in sample_prompts("train", TRAIN_PROMPTS, seed=0)]
    cost = _cost_of_update(method, seed, prompts)
    for stop in STOPS:
        judged = folder / f"judged-{stop:g}.json"
        if judged.is_file():
            continue
        updates = max(1, round((stop * budget - cost["start"]) / cost["update"]))
        place = folder / "run"
        config = _config(method, seed, place, [f"learning.updates={updates}", "learning.checkpoint_every=50"])
        model = Checkpoint.load("shapes")
        trainer = _trainer(model, prompts, config)
        print(trainer.plan(), flush=True)
        trainer.train(resume=place.exists())
        trainer.save(folder / f"lora-{stop:g}")
        entries = read_metrics(trainer.folder)
        recent = entries[-max(1, len(entries) // 10) :]
        facts = {
            "evaluations": cost["start"] + updates * cost["update"],
            "updates": updates,
            "seconds": entries[-1]["seconds"],
            "reward": statistics.mean(entry["reward/mean"] for entry in recent),
            **path_kl(model, images),
            "verdicts": verdicts(model, images, tuple(SAMPLERS) if stop == STOPS[-1] else (WATCHED,)),
        }
        write(judged, facts)


def verdicts(model: Checkpoint, images: int, samplers: Sequence[str]) -> dict[str, dict[str, str]]:
    """By sampler and split, a digit for each prompt: 1 where its image shows what was asked for.

    Training prompts only choose among several samplers.
    """
    splits: dict[str, list[Prompt]] = held_out_prompts(images, seed=0)
    if len(samplers) > 1:
        splits |= {"train": sample_prompts("train", images, seed=0)}
    found = {}
    for name in samplers:
        judged = evaluate(model, splits, SAMPLERS[name])
        found[name] = {
            split: "".join(str(int(holds)) for holds in judged.holds[judged.where(split)]) for split in splits
        }
    return found


def _cost_of_update(method: Method, seed: int, prompts: list[str]) -> dict[str, int]:
    """Denoiser evaluations of one update and of what comes before the first, counted on a run of two updates."""
    counts = []
    for updates in (1, 2):
        model = Checkpoint.load("shapes")
        counter = Evaluations(model.denoiser)
        with tempfile.TemporaryDirectory() as folder:
            config = _config(
                method,
                seed,
                Path(folder) / "run",
                [f"learning.updates={updates}", "preview_every=0", "preflight=false"],
            )
            _trainer(model, prompts, config).train()
        counts.append(counter.count)
    return {"update": counts[1] - counts[0], "start": 2 * counts[0] - counts[1]}


@torch.no_grad()
def path_kl(model: Checkpoint, images: int) -> dict[str, float]:
    """KL from the base along paths of the reverse SDE without guidance, the same for every method, in nats.

    That of the last steps is told apart: their noise is so small that a difference too small to see outweighs the rest.
    """
    prompts = [prompt.text for prompt in held_out_prompts(images, seed=0)["in_domain"]]
    generators = [image_generator(0, index, 0) for index in range(len(prompts))]
    cond, grid, kernel = model.encode_prompts(prompts), model.grid(TRAINED_STEPS), Ddim(1.0)
    drawn = sample(model, cond, grid, kernel, guidance_scale=1.0, generators=generators)
    costs: list[float] = []
    for step in range(grid.num_steps):
        at = drawn.latents[step], grid[step]
        policy = transition(model, predict(model, *at, cond, guidance_scale=1.0), *at, grid[step + 1], kernel)
        with reference(model.denoiser):
            base = transition(model, predict(model, *at, cond, guidance_scale=1.0), *at, grid[step + 1], kernel)
        costs.append(policy.kl(base).mean().item())
    return {"kl": sum(costs[:-LAST_STEPS]), "kl_last_steps": sum(costs[-LAST_STEPS:])}


def _config(method: Method, seed: int, folder: Path, more: list[str]) -> Any:
    """The shapes configuration of an algorithm, with a seed and a place of its own."""
    whole, own = (EndpointRunConfig, EndpointConfig) if method.algorithm == "endpoint" else (GRPORunConfig, GRPOConfig)
    words = [f"seed={seed}", f"output={folder}", "learning.progress=false", *method.overrides, *more]
    return part_of(load_config(whole, CONFIGS / f"{method.algorithm}_shapes.yaml", words), own)


def _trainer(model: Checkpoint, prompts: list[str], config: Any) -> Trainer:
    algorithm: Any = Endpoint if isinstance(config, EndpointConfig) else GRPO
    return Trainer(model, algorithm("shapes", prompts, config))


def main(argv: list[str] | None = None) -> None:
    """Run what the words ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "report", "one", "base"])
    parser.add_argument("--folder", type=Path, default=Path("runs/online_rl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=int, default=80_000, help="denoiser evaluations per run")
    parser.add_argument("--images", type=int, default=160, help="prompts of each split that a model is judged by")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time, one core each")
    parser.add_argument("--method", choices=list(METHODS), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    common = [f"--folder={args.folder}", f"--budget={args.budget}", f"--images={args.images}"]
    titles = {name: method.title for name, method in METHODS.items()}
    if args.part == "base":
        write(
            args.folder / "base.json",
            {"verdicts": verdicts(Checkpoint.load("shapes"), args.images, tuple(SAMPLERS))},
        )
    elif args.part == "one":
        place = args.folder / f"{args.method}-{args.seeds[0]}"
        train(METHODS[args.method], args.seeds[0], args.budget, args.images, place)
    else:
        if args.part in PARTS:
            jobs = [(["base", *common], "base")] if not (args.folder / "base.json").is_file() else []
            jobs += [
                (["one", *common, f"--seeds={seed}", f"--method={name}"], f"{name}-{seed}")
                for seed in (args.seeds if args.part == "compare" else args.seeds[:1])
                for name in PARTS[args.part]
            ]
            with ThreadPoolExecutor(args.workers) as pool:
                list(pool.map(lambda job: on_one_core(__file__, job[0], args.folder / f"{job[1]}.log"), jobs))
        report(args.folder, titles, PARTS["compare"])


if __name__ == "__main__":
    main()
