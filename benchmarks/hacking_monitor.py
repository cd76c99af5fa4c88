"""Does the monitor see a reward that is gamed, in time, and leave a good run alone?

    python benchmarks/hacking_monitor.py              # both runs with two seeds, one core each; figure and table
    python benchmarks/hacking_monitor.py report       # from what is finished

Two runs of DDPO on `shapes`, alike but for the reward. "gamed" is rewarded for colourful pixels, whatever was asked
for; "good" for what the verifier's graded score says. Both are watched by `shapes-clip`, a small CLIP model that
neither is trained on, on 96 prompts at every second rollout. At each of these the model is judged besides by the
verifier, on 160 held-out prompts by the sampler of the rollouts, which nothing in the run knows of.

A run that was killed goes on. About half an hour on two cores.
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
from jobs import on_one_core, read, write
from objectives_judge import pack, unpack

from rpo.config.load import load_config
from rpo.evaluation.image_statistics import saturation
from rpo.evaluation.intervals import paired_gain
from rpo.files.text import write_text
from rpo.models.checkpoint import Checkpoint
from rpo.reports.charts import Chart, Mark, Series, draw_figure
from rpo.rewards import score
from rpo.rewards.base import Reward
from rpo.runs.train_config import GRPORunConfig, part_of
from rpo.sampling.sample import generate
from rpo.shapes.prompts import held_out_texts, sample_prompts
from rpo.shapes.reward import GRADED, STRICT
from rpo.trainers.grpo import GRPO
from rpo.trainers.grpo_config import GRPOConfig
from rpo.trainers.rollouts.settings import MonitorConfig
from rpo.trainers.trainer import Trainer
from rpo.training.log import read_metrics

HERE = Path(__file__).parent
RESULTS, FIGURE = HERE / "hacking_monitor.json", HERE / "hacking_monitor.svg"
HELD_OUT = "held_out/shapes-clip"
SETTINGS = (
    "baseline=prompt_history",
    "learning.learning_rate=1e-3",
    "learning.updates=24",
    "learning.checkpoint_every=10",
    "monitor.prompts=96",
    "monitor.every=2",
    "preview_every=0",
)


def colourful(images: Any, prompts: Any) -> Any:
    """A reward that is easily gamed: it does not read prompts."""
    del prompts
    return saturation(images)


REWARDS: dict[str, Reward] = {"gamed": colourful, "good": GRADED}


def trainer_of(name: str, seed: int, folder: Path, *more: str) -> Trainer:
    """What trains one of the two.

    Args:
        more: Settings, as KEY=VALUE.
    """
    words = [*SETTINGS, f"seed={seed}", f"output={folder}", *more]
    config = load_config(GRPORunConfig, HERE.parent / "configs/grpo_shapes.yaml", words)
    prompts = [prompt.text for prompt in sample_prompts("train", 512, seed=0)]
    return Trainer(Checkpoint.load("shapes"), GRPO(REWARDS[name], prompts, part_of(config, GRPOConfig)))


def verified(trainer: Trainer) -> list[float]:
    """What the verifier says of 160 held-out prompts, drawn by the sampler of the rollouts: 1 or 0 of each."""
    asked, rollout = held_out_texts(160, seed=0)["in_domain"], cast(GRPOConfig, trainer.algorithm.config).rollout
    images = generate(
        trainer.run.model,
        asked,
        seed=7,
        num_steps=rollout.num_steps,
        guidance_scale=rollout.guidance_scale,
        eta=rollout.eta,
        spacing="uniform",
    )
    return score(STRICT, images, asked, name="verifier").tolist()


def one_run(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train, and judge on the way: what was watched, what the verifier says, and the alarms."""
    trainer, judged = trainer_of(name, seed, folder / "run"), folder / "judged.json"

    def judge(update: int) -> None:
        known = read(judged) or {}
        if str(update) not in known:
            write(judged, known | {str(update): verified(trainer)})

    def after(update: int, metrics: dict[str, float]) -> None:
        if update % 2 == 0:  # the monitor looks before the next rollout, at the weights as they are now
            judge(update)

    judge(0)
    trainer.train(resume=(folder / "run").exists(), on_update=after)
    entries = [entry for entry in read_metrics(trainer.folder) if entry.get("watched/reward") is not None]
    found = {
        "watched": [{"update": entry["update"] - 1, **_seen(entry)} for entry in entries],
        "verifier": {update: pack([one > 0 for one in scores]) for update, scores in (read(judged) or {}).items()},
    }
    write(folder / "result.json", found)
    return found


def _seen(entry: dict[str, float]) -> dict[str, float]:
    return {name: entry[name] for name in entry if name.startswith(("watched/", "held_out/"))}


def report(runs: dict[str, Any]) -> str:
    """The table; writes the figure."""
    heads = ("run", "first alarm", "verified before the run, then", "lost by then", "at the end")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, found in runs.items():
        right = {int(update): unpack(one).astype(float) for update, one in found["verifier"].items()}
        last = max(right)
        at = _alarm(found)
        told = "none | |"
        if at is not None:
            lost = paired_gain(right[0], right[at], groups=list(range(len(right[0]))), seed=0)
            told = (
                f"after {at} updates | {100 * right[0].mean():.1f}, {100 * right[at].mean():.1f} % | "
                f"{100 * lost.value:+.1f} [{100 * lost.low:+.1f}, {100 * lost.high:+.1f}]"
            )
        lines.append(f"| {name} | {told} | {100 * right[last].mean():.1f} % |")
    charts = [
        _chart("Trained reward, watched prompts", runs, lambda found: _points(found, "watched/reward"), by_start=True),
        _chart("shapes-clip, which neither is trained on", runs, lambda found: _points(found, HELD_OUT)),
        _chart("Verified accuracy, held-out prompts, %", runs, _accuracy),
    ]
    write_text(FIGURE, draw_figure(charts))
    return "\n".join(lines)


def _alarm(found: dict[str, Any]) -> int | None:
    """After how many updates the fall of the held-out reward is an alarm, as the monitor's defaults have it."""
    least = MonitorConfig().alarm
    return next((one["update"] for one in found["watched"] if one["watched/fall"] >= least), None)


def _points(found: dict[str, Any], metric: str) -> list[tuple[float, float]]:
    return [(one["update"], one[metric]) for one in found["watched"]]


def _accuracy(found: dict[str, Any]) -> list[tuple[float, float]]:
    return sorted((float(update), 100 * float(np.mean(unpack(one)))) for update, one in found["verifier"].items())


def _chart(title: str, runs: dict[str, Any], points: Any, *, by_start: bool = False) -> Chart:
    series, marks = [], []
    for name, found in runs.items():
        x, y = zip(*points(found), strict=True)
        y = tuple(one / y[0] for one in y) if by_start else y
        series.append(Series(name, x, y, is_noisy=False))
    alarms = [f"{name} after {at} updates" for name, found in runs.items() if (at := _alarm(found)) is not None]
    told = f"Alarms: {', '.join(alarms) or 'none'}."
    marks = [Mark("start", series[0].y[0])]
    return Chart(title + (", by the start's" if by_start else ""), tuple(series), tuple(marks), told)


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="all", choices=["all", "one", "report"], help="all by default")
    parser.add_argument("--run", choices=list(REWARDS), help="which, with `one`")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of the runs (default 0 1)")
    parser.add_argument("--folder", type=Path, default=Path("runs/hacking_monitor"), help="for what is not finished")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time, of one core each")
    args = parser.parse_args()
    if args.what == "one":
        one_run(args.run, args.seeds[0], args.folder / f"{args.run}-{args.seeds[0]}")
        return
    if args.what == "all":
        jobs = [(name, seed) for seed in args.seeds for name in REWARDS]
        with ThreadPoolExecutor(args.workers) as pool:
            running = [
                pool.submit(
                    on_one_core,
                    str(Path(__file__)),
                    ["one", f"--run={name}", f"--seeds={seed}", f"--folder={args.folder}"],
                    args.folder / f"{name}-{seed}.log",
                )
                for name, seed in jobs
                if not (args.folder / f"{name}-{seed}" / "result.json").is_file()
            ]
        for one in running:
            one.result()  # a run that failed fails here
        known = (read(RESULTS) or {"runs": {}})["runs"]
        new = {f"{name}, seed {seed}": read(args.folder / f"{name}-{seed}" / "result.json") for name, seed in jobs}
        write(RESULTS, {"runs": known | {name: one for name, one in new.items() if one}})
    if (found := read(RESULTS)) is None:
        sys.exit(f"{RESULTS} is not there; run this without `report` first")
    table = report(found["runs"])
    write(RESULTS, found | {"tables": {"runs": table}})
    print(table)


if __name__ == "__main__":
    main()
