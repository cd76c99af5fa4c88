"""Score as action against GRPO and DDPO on `shapes`, at equal cost in denoiser evaluations.

    python benchmarks/online_rl.py compare            # three seeds each; table and figure
    python benchmarks/online_rl.py designs            # the designs of the value network
    python benchmarks/online_rl.py steps              # what was trained, drawn with 5 to 40 steps and by another solver
    python benchmarks/online_rl.py report             # from what is finished so far

Every run starts from the embedded checkpoint, sees the same prompts and is told the graded verdict of the verifier. One
evaluation is one latent through the denoiser, forward or backward; rollouts, training, the watched KL and the value's
own rollouts all count. Every run is judged after a quarter, half and all of the budget, on held-out prompts by 20 DDIM
steps: without guidance, as it was trained, and with guidance 3, which suits the base model. The KL from the base is
that of paths of the reverse SDE in 10 steps, for every method the same; that of the last two stands apart. Each seed is
a process on one core that continues where it was killed: start the command again. Everything lies in one folder;
`results.json` has every number of the tables.
"""

import argparse
import os
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jobs import on_one_core, write
from online_rl_report import GUIDANCE, STOPS, report
from torch import nn

from rpo.config import load_config
from rpo.diffusion.transition import Ddim
from rpo.lora import reference
from rpo.models.solvers import BlackBoxSolver
from rpo.models.stable_diffusion import StableDiffusion
from rpo.rewards import load_reward
from rpo.sampler import image_generator, replay, sample
from rpo.shapes.evaluate import evaluate, held_out_prompts
from rpo.shapes.evaluation import Sampling
from rpo.shapes.prompts import Prompt, sample_prompts
from rpo.trainers.grpo import GRPOTrainer
from rpo.trainers.grpo_run import RunConfig as GRPORun
from rpo.trainers.score_as_action import ScoreAsActionTrainer
from rpo.trainers.score_as_action_config import ScoreAsActionConfig
from rpo.trainers.score_as_action_run import RunConfig as ScoreAsActionRun
from rpo.training.log import read_metrics

CONFIGS = Path(__file__).parent.parent / "configs"
TRAIN_PROMPTS = 512
"""An equal share of each kind of prompt."""
STEP_COUNTS = (5, 10, 20, 40)
TRAINED_STEPS = 10
LAST_STEPS = 2


@dataclass(frozen=True)
class Method:
    """One way to train: a trainer and what its settings are, beside those of the shapes configuration."""

    title: str
    trainer: str
    overrides: tuple[str, ...] = ()


WITH_VALUE = ("advantage=return_minus_value", "value.reward_until=1")
"""V of every noised moment as the baseline, in place of what the other images of the prompt earned."""

METHODS = {
    "score_as_action": Method("score as action", "score_as_action"),
    "grpo": Method("GRPO", "grpo"),
    "ddpo": Method("DDPO", "grpo", ("baseline=prompt_history",)),
    **{
        f"design_{design}": Method(f"value design {design}", "score_as_action", (*WITH_VALUE, f"value.design={design}"))
        for design in ("cos_sin", "cos", "linear", "none")
    },
}
PARTS = {
    "compare": ("score_as_action", "grpo", "ddpo"),
    "designs": tuple(name for name in METHODS if name.startswith("design_")),
    "steps": ("score_as_action", "ddpo"),
}


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
        config = _config(method, seed, place, [f"loop.updates={updates}", "loop.checkpoint_every=50"])
        trainer = _trainer(StableDiffusion.load("shapes"), prompts, config)
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
            "explained_variance": [
                _mean(recent, f"value/explained_variance{part}") for part in ("", "_1", "_2", "_3", "_4")
            ],
            **path_kl(trainer.run.model, images),
            **accuracies(trainer.run.model, images),
        }
        write(judged, facts)


def _cost_of_update(method: Method, seed: int, prompts: list[str]) -> dict[str, int]:
    """Denoiser evaluations of one update and of what comes before the first, counted on a run of two updates."""
    counts = []
    for updates in (1, 2):
        model = StableDiffusion.load("shapes")
        counter = Evaluations(model.denoiser)
        with tempfile.TemporaryDirectory() as folder:
            config = _config(
                method, seed, Path(folder) / "run", [f"loop.updates={updates}", "preview_every=0", "preflight=false"]
            )
            _trainer(model, prompts, config).train()
        counts.append(counter.count)
    return {"update": counts[1] - counts[0], "start": 2 * counts[0] - counts[1]}


def accuracies(model: StableDiffusion, images: int) -> dict[str, float]:
    """Verified accuracy on held-out prompts without and with guidance, in percent."""
    prompts, found = held_out_prompts(images, seed=0), {}
    for ending, guidance_scale in GUIDANCE.items():
        judged = evaluate(model, prompts, Sampling(seed=0, guidance_scale=guidance_scale))
        for domain in dict.fromkeys(judged.domains):
            found[f"{domain}{ending}"] = 100 * float(judged.holds[judged.where(domain)].mean())
    return found


def accuracy_by_steps(model: StableDiffusion, images: int) -> dict[str, float]:
    """Verified accuracy on in-domain prompts for several numbers of DDIM steps and for DPM-Solver++, in percent."""
    prompts = held_out_prompts(images, seed=0)["in_domain"]
    found = {f"DDIM {count}": _accuracy(model, prompts, count, is_multistep=False) for count in STEP_COUNTS}
    return found | {f"DPM-Solver++ {TRAINED_STEPS}": _accuracy(model, prompts, TRAINED_STEPS, is_multistep=True)}


def _accuracy(model: StableDiffusion, prompts: list[Prompt], num_steps: int, *, is_multistep: bool) -> float:
    """Without guidance, as the model was trained."""
    texts = [prompt.text for prompt in prompts]
    kernel = BlackBoxSolver(model, num_steps) if is_multistep else Ddim(0.0)
    grid = kernel.grid if isinstance(kernel, BlackBoxSolver) else model.grid(num_steps)
    generators = [image_generator(0, index, 0) for index in range(len(texts))]
    drawn = sample(model, model.encode_prompts(texts), grid, kernel, guidance_scale=1.0, generators=generators)
    return 100 * float(load_reward("shapes-strict")(model.decode(drawn.x_0), texts).mean())


@torch.no_grad()
def path_kl(model: StableDiffusion, images: int) -> dict[str, float]:
    """KL from the base along paths of the reverse SDE without guidance, the same for every method, in nats.

    That of the last steps is told apart: their noise is so small that a difference too small to see outweighs the rest.
    """
    prompts = [prompt.text for prompt in held_out_prompts(images, seed=0)["in_domain"]]
    generators = [image_generator(0, index, 0) for index in range(len(prompts))]
    cond, grid, kernel = model.encode_prompts(prompts), model.grid(TRAINED_STEPS), Ddim(1.0)
    drawn = sample(model, cond, grid, kernel, guidance_scale=1.0, generators=generators)
    costs: list[float] = []
    for step in range(grid.num_steps):
        transition = replay(model, drawn, step, kernel, guidance_scale=1.0)
        with reference(model.denoiser):
            costs.append(transition.kl(replay(model, drawn, step, kernel, guidance_scale=1.0)).mean().item())
    return {"kl": sum(costs[:-LAST_STEPS]), "kl_last_steps": sum(costs[-LAST_STEPS:])}


def steps(folder: Path, images: int) -> None:
    """The step-count table of one finished run."""
    model = StableDiffusion.load("shapes")
    model.pipe.load_lora_weights(str(folder / f"lora-{STOPS[-1]:g}"))
    write(folder / "steps.json", accuracy_by_steps(model, images))


def _config(method: Method, seed: int, folder: Path, more: list[str]) -> Any:
    """The shapes configuration of a trainer, with a seed and a place of its own."""
    section = method.trainer
    words = [f"seed={seed}", f"folder={folder}", "loop.progress=false", *method.overrides, *more]
    module = ScoreAsActionRun if section == "score_as_action" else GRPORun
    run = load_config(module, CONFIGS / f"{section}_shapes.yaml", [f"{section}.{word}" for word in words])
    return getattr(run, section)


def _trainer(model: StableDiffusion, prompts: list[str], config: Any) -> Any:
    if isinstance(config, ScoreAsActionConfig):
        return ScoreAsActionTrainer(model, "shapes", prompts, config)
    return GRPOTrainer(model, "shapes", prompts, config)


def _mean(entries: list[dict[str, Any]], metric: str) -> float | None:
    values = [entry[metric] for entry in entries if entry.get(metric) is not None]
    return statistics.mean(values) if values else None


def main(argv: list[str] | None = None) -> None:
    """Run what the words ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "report", "one-train", "one-steps", "base"])
    parser.add_argument("--folder", type=Path, default=Path("runs/online_rl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=int, default=200_000, help="denoiser evaluations per run")
    parser.add_argument("--images", type=int, default=200, help="held-out prompts of each domain")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time, one core each")
    parser.add_argument("--method", choices=list(METHODS), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    common = [f"--folder={args.folder}", f"--budget={args.budget}", f"--images={args.images}"]
    if args.part == "base":
        model = StableDiffusion.load("shapes")
        write(args.folder / "base.json", accuracies(model, args.images))
        write(args.folder / "base" / "steps.json", accuracy_by_steps(model, args.images))
    elif args.part == "one-train":
        place = args.folder / f"{args.method}-{args.seeds[0]}"
        train(METHODS[args.method], args.seeds[0], args.budget, args.images, place)
    elif args.part == "one-steps":
        steps(args.folder / f"{args.method}-{args.seeds[0]}", args.images)
    elif args.part == "report":
        report(args.folder, {name: method.title for name, method in METHODS.items()}, PARTS["compare"])
    else:
        kind = "one-steps" if args.part == "steps" else "one-train"
        jobs = [(["base", *common], "base")] if not (args.folder / "base.json").is_file() else []
        seeds = args.seeds[:1] if args.part == "designs" else args.seeds
        for seed in seeds:
            for name in PARTS[args.part]:
                jobs.append(([kind, *common, f"--seeds={seed}", f"--method={name}"], f"{name}-{seed}"))
        with ThreadPoolExecutor(args.workers) as pool:
            list(pool.map(lambda job: on_one_core(__file__, job[0], args.folder / f"{job[1]}.log"), jobs))
        report(args.folder, {name: method.title for name, method in METHODS.items()}, PARTS["compare"])


if __name__ == "__main__":
    main()
