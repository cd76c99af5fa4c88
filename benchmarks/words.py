"""Can a reward that reads text teach a model to write? `words`: RapidOCR is the reward, a judge of ours tells.

    python benchmarks/words.py plan                    # what would be run
    python benchmarks/words.py compare                 # every arm, three seeds; table and figure
    python benchmarks/words.py compare --arms nft --seeds 3
    python benchmarks/words.py report                  # from what is finished so far

Every run starts from the embedded checkpoint with a configuration of the package. It is judged at the stops of `STOPS`
on held-out words, in and out of domain: by the reward that it learns from, and by the judge, which reads with the
glyphs that the world was set in and shares nothing with RapidOCR. Base and run draw the same words from the same noise.

A run is a process on one core that continues where it was killed: start the command again. What is finished is added to
`benchmarks/words.json` and not repeated unless its settings have changed or `--again` is given.
"""

import argparse
import hashlib
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from jobs import on_one_core, read, write
from objectives_judge import pack, unpack

import rpo.words
from rpo.adapters.loading import load_model
from rpo.cli.main import COMMANDS
from rpo.config.load import load_config
from rpo.evaluation.held_out import Sampling
from rpo.evaluation.intervals import Interval, paired_gain
from rpo.files.text import lines, read_text, write_text
from rpo.files.whole import read_lines
from rpo.models.checkpoint import Checkpoint
from rpo.reports.charts import Chart, Mark, Series, draw_figure
from rpo.rewards import load_reward
from rpo.runs.align import align
from rpo.runs.train import ONLINE
from rpo.runs.train_config import part_of
from rpo.trainers.trainer import Trainer
from rpo.training.log import read_metrics
from rpo.words.prompts import HELD_OUT, held_out_texts, texts

RESULTS = Path(__file__).parent / "words.json"
CONFIGS = Path(__file__).parent.parent / "configs"
STOPS = (1 / 3, 2 / 3, 1.0)
"""Shares of the updates, or rounds, at which a run is judged."""

REWARD, JUDGE = "ocr", "words-judge"
GUIDANCES = (1.0, 2.0, 3.0)
"""Guidance alone mends some of what the base does wrong, so that a gain must be one at every strength of it."""

WATCHING = ("learning.progress=false", "preview_every=0", "preflight=false")


@dataclass(frozen=True)
class Arm:
    """One way to learn: a command of the package, and what is not as in its configuration of `words`."""

    title: str
    command: str
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the command, as it is typed."""
        return self.command if self.command == "align" else f"train {self.command}"


ARMS = {
    "dpo": Arm("rounds of DPO", "align", ("held_out.count=2", "curate.progress=false")),
    "nft": Arm("DiffusionNFT", "endpoint"),
    "rvm": Arm("RVM", "endpoint", ("objective.kind=rvm",)),
    "ddpo": Arm("DDPO", "grpo", ("baseline=prompt_history",)),
}


@dataclass(frozen=True)
class Job:
    """One run: an arm and a seed."""

    arm: str
    seed: int
    images: int
    """Held-out words of each domain that it is judged by."""

    @property
    def settings(self) -> dict[str, Any]:
        """What a finished run must have in common with it to stand for it."""
        arm = ARMS[self.arm]
        text = "\n".join(line.partition("#")[0] for line in lines(read_text(self.config_file)))
        digest = hashlib.sha256(text.encode()).hexdigest()
        return {"command": arm.command, "overrides": list(arm.overrides), "images": self.images, "config": digest[:8]}

    @property
    def config_file(self) -> Path:
        """The configuration of the package."""
        return CONFIGS / f"{ARMS[self.arm].command}_words.yaml"

    def folder(self, root: Path) -> Path:
        """Where it lies; of other settings another one."""
        digest = hashlib.sha256(json.dumps(self.settings).encode()).hexdigest()[:8]
        return root / f"{self.arm}-{self.seed}-{digest}"

    def config(self, place: Path, *more: str) -> Any:
        """Its settings, in a folder."""
        arm = ARMS[self.arm]
        watching = [f"dpo.{word}" for word in WATCHING] if arm.command == "align" else WATCHING
        words = [f"seed={self.seed}", f"output={place}", *watching, *arm.overrides, *more]
        return load_config(COMMANDS[arm.name].config_class, self.config_file, words)

    def until(self, place: Path, share: float) -> tuple[Checkpoint, dict[str, float]]:
        """Train on to a share of its updates, or of its rounds: the model as it is then, and what it took."""
        if ARMS[self.arm].command == "align":
            rounds = round(share * self.config(place).rounds)
            ended = align(config := self.config(place, f"rounds={rounds}"), resume=place.exists())
            seconds = [
                float(str(one["seconds"])) for one in read_lines(place / "stages.jsonl") if one["stage"] != "judge"
            ]
            model = load_model(replace(config.curate.source.model, lora=str(ended.lora)))
            return model, {"updates": rounds, "seconds": sum(seconds)}
        updates = round(share * self.config(place).learning.updates)
        config = self.config(place, f"learning.updates={updates}")
        algorithm, own = ONLINE[type(config)]
        learns = algorithm(config.rewards, texts("train", seed=0), part_of(config, own))
        trainer = Trainer(Checkpoint.load("words"), learns)
        trainer.train(resume=trainer.folder.exists())
        assert isinstance(model := trainer.run.model, Checkpoint)
        return model, {"updates": updates, "seconds": float(read_metrics(trainer.folder)[-1]["seconds"])}


def train(job: Job, folder: Path) -> dict[str, Any]:
    """One run, judged at every stop; continues where an earlier call ended."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    stops: dict[str, Any] = {}
    for stop in STOPS:
        if not (file := folder / f"judged-{stop:g}.json").is_file():
            model, facts = job.until(folder / "run", stop)
            write(file, facts | judged(model, job.images, in_full=stop == STOPS[-1]))
        stops[f"{stop:g}"] = read(file)
    result = {"settings": job.settings, "stops": stops}
    write(folder / "result.json", result)
    return result


def judged(model: Checkpoint, images: int, *, in_full: bool) -> dict[str, Any]:
    """Verdicts of the judge and scores of the reward, by guidance and domain; and what an image costs the reward.

    Args:
        images: Words of each domain.
        in_full: By every guidance, not only by the checkpoint's own.
    """
    reward, judge, spent, scored = load_reward(REWARD), load_reward(JUDGE), 0.0, 0
    found: dict[str, Any] = {"judge": {}, "reward": {}}
    for guidance in GUIDANCES if in_full else (rpo.words.GUIDANCE_SCALE,):
        sampling = Sampling(0, num_steps=rpo.words.NUM_STEPS, guidance_scale=guidance, eta=rpo.words.ETA)
        name = f"guidance {guidance:g}"
        found["judge"][name], found["reward"][name] = {}, {}
        for domain, prompts in held_out_texts(images, seed=0).items():
            drawn = sampling.draw(model, prompts, batch_size=64)
            found["judge"][name][domain] = pack(judge(drawn, prompts).numpy() == 1)
            began = time.process_time()
            found["reward"][name][domain] = [round(one, 3) for one in reward(drawn, prompts).tolist()]
            spent, scored = spent + time.process_time() - began, scored + len(prompts)
    return found | {"reward_seconds": round(spent / scored, 4)}


def report(file: Path) -> dict[str, Any]:
    """Add the table to the results, print it, and draw the figure beside them."""
    results = read(file) or {}
    if "base" not in results or not results.get("runs"):
        return results
    runs = {arm: list(results["runs"][arm].values()) for arm in ARMS if results["runs"].get(arm)}
    results["tables"] = {f"guidance {one:g}": "\n".join(rows(results["base"], runs, one)) for one in GUIDANCES}
    for name, table in results["tables"].items():
        print(f"\n{name}\n\n{table}")
    write_text(file.with_suffix(".svg"), draw_figure(charts(results["base"], runs)))
    write(file, results)
    return results


def rows(base: dict[str, Any], runs: dict[str, list[dict[str, Any]]], guidance: float) -> Iterator[str]:
    """Judge and reward side by side: a row for the base, and one for each arm with its gains."""
    yield (
        "| | seeds | minutes | judge, in-domain % | gain | out-of-domain % | gain "
        "| reward, in-domain | gain | out-of-domain | gain |"
    )
    yield "|---" * 11 + "|"
    cells = [f"{mean([base], by, guidance, domain)} | " for by in ("judge", "reward") for domain in HELD_OUT]
    yield f"| base | | | {' | '.join(cells)} |"
    for arm, some in runs.items():
        ends = [run["stops"][f"{STOPS[-1]:g}"] for run in some]
        minutes = statistics.mean(end["seconds"] for end in ends) / 60
        cells = [
            f"{mean(ends, by, guidance, domain)} | {gain(base, ends, by, guidance, domain)}"
            for by in ("judge", "reward")
            for domain in HELD_OUT
        ]
        yield f"| {ARMS[arm].title} | {len(some)} | {minutes:.0f} | {' | '.join(cells)} |"


def scores(one: dict[str, Any], by: str, guidance: float, domain: str) -> np.ndarray:
    """A number for each word: 100 for right by the judge, a hundred times the reward."""
    kept = one[by][f"guidance {guidance:g}"][domain]
    return 100 * (unpack(kept).astype(float) if by == "judge" else np.array(kept))


def mean(some: Sequence[dict[str, Any]], by: str, guidance: float, domain: str) -> str:
    """Over all words, with the deviation of the seeds."""
    means = [float(scores(one, by, guidance, domain).mean()) for one in some]
    more = f" ± {statistics.stdev(means):.1f}" if len(means) > 1 else ""
    return f"{statistics.mean(means):.1f}{more}"


def gain(base: dict[str, Any], ends: Sequence[dict[str, Any]], by: str, guidance: float, domain: str) -> str:
    """Points over the base, paired by word; the seeds of an arm are images of one word."""
    before = scores(base, by, guidance, domain)
    after = np.concatenate([scores(end, by, guidance, domain) for end in ends])
    found = paired_gain(np.tile(before, len(ends)), after, groups=list(range(len(before))) * len(ends), seed=0)
    return _points(found)


def _points(found: Interval) -> str:
    return f"{found.value:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"


def charts(base: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> list[Chart]:
    """The judge's accuracy and the reward against minutes, on held-out words in domain."""
    guidance, titles = rpo.words.GUIDANCE_SCALE, {"judge": "Right by the judge (%)", "reward": "Reward (×100)"}
    made: list[Chart] = []
    for by, title in titles.items():
        start = float(scores(base, by, guidance, HELD_OUT[0]).mean())
        series: list[Series] = []
        for arm, some in runs.items():
            stops = [[run["stops"][f"{stop:g}"] for run in some] for stop in STOPS]
            x = [0.0, *(statistics.mean(one["seconds"] for one in at) / 60 for at in stops)]
            y = [
                start,
                *(statistics.mean(float(scores(o, by, guidance, HELD_OUT[0]).mean()) for o in at) for at in stops),
            ]
            series.append(Series(ARMS[arm].title, tuple(x), tuple(y), is_noisy=False))
        made.append(
            Chart(
                title,
                tuple(series),
                (Mark("base", start),),
                f"Held-out words in domain, {rpo.words.NUM_STEPS} ancestral steps at guidance {guidance:g}.",
                x_label="minutes of training on one core",
            )
        )
    return made


def compare(args: argparse.Namespace) -> None:
    """Run what is missing, each run a process, and take it into the results as it ends."""
    jobs = [Job(arm, seed, args.images) for seed in args.seeds for arm in args.arms]
    results, lock = read(args.results) or {}, Lock()
    waiting = [job for job in jobs if args.again or _known(results, job) != job.settings]
    print("\n".join(["to do:", *(f"  {ARMS[job.arm].title}, seed {job.seed}" for job in waiting)]), flush=True)
    if args.part == "plan":
        return
    common = [f"--folder={args.folder}", f"--images={args.images}"]

    def base() -> None:
        place = args.folder / f"base-{args.images}.json"
        if not place.is_file():
            on_one_core(__file__, ["base", *common], place.with_suffix(".log"))
        _add(args.results, read(place) or {}, lock, "base")

    def one(job: Job) -> None:
        place = job.folder(args.folder)
        if args.again or not (place / "result.json").is_file():
            words = [f"--arms={job.arm}", f"--seeds={job.seed}"]
            on_one_core(__file__, ["one", *common, *words], place.with_suffix(".log"))
        _add(args.results, read(place / "result.json") or {}, lock, "runs", job.arm, str(job.seed))

    with ThreadPoolExecutor(args.workers) as pool:
        for wait in [pool.submit(base), *(pool.submit(one, job) for job in waiting)]:
            wait.result()


def _known(results: dict[str, Any], job: Job) -> Any:
    return results.get("runs", {}).get(job.arm, {}).get(str(job.seed), {}).get("settings")


def _add(file: Path, found: dict[str, Any], lock: Lock, *place: str) -> None:
    with lock:
        results: dict[str, Any] = read(file) or {}
        inner = results
        for name in place[:-1]:
            inner = inner.setdefault(name, {})
        inner[place[-1]] = found
        write(file, results)


def main(argv: list[str] | None = None) -> None:
    """Run what the words ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["compare", "plan", "report", "one", "base"])
    parser.add_argument("--arms", choices=list(ARMS), nargs="+", default=list(ARMS)[:1], help="ways to learn")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the runs")
    parser.add_argument("--images", type=int, default=200, help="held-out words of each domain")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time, a core each")
    parser.add_argument("--folder", type=Path, default=Path("runs/words"), help="of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file of all results")
    parser.add_argument("--again", action="store_true", help="run what is finished already, too")
    args = parser.parse_args(argv)
    if args.part == "base":
        write(args.folder / f"base-{args.images}.json", judged(Checkpoint.load("words"), args.images, in_full=True))
    elif args.part == "one":
        job = Job(args.arms[0], args.seeds[0], args.images)
        train(job, job.folder(args.folder))
    else:
        if args.part != "report":
            compare(args)
        if args.part != "plan":
            report(args.results)


if __name__ == "__main__":
    main()
