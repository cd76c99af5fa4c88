"""Which online objective should one take? All that the package has, on `shapes`, at equal cost in denoiser evaluations.

    python benchmarks/objectives.py plan               # what would be run, and about how long it takes
    python benchmarks/objectives.py compare            # every arm, both rewards, three seeds; tables and figures
    python benchmarks/objectives.py compare --reward graded --arms ddpo nft --seeds 3 4
    python benchmarks/objectives.py report             # from what is finished so far

Every run starts from the embedded checkpoint and sees the same prompts, so many images of each. The reward is the
verifier's graded score ("graded"), or a learned one ("proxy"), of which the verifier then is the truth. One evaluation
is one latent through the denoiser, forward or backward, and everything that a run asks counts; images that a reward
was asked about are counted apart.

A sampler can be worth as much as training is. So every model, the base too, is judged by every sampler of `SAMPLERS`,
among them the one that its rollouts were drawn by, and by the best of them as training prompts tell it. Gains are those
over the base at *its* best. On their way runs are judged by one sampler that is good for the base.

A run is a process on one core that continues where it was killed: start the command again. What is finished is added to
`benchmarks/objectives.json` and not repeated, so that seeds can come from other days and machines, unless its settings
have changed or `--again` is given. One run takes about 4 minutes of training and 6 of judging on one core; one seed of
every arm with both rewards about two hours on two cores.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from jobs import on_one_core, read, write
from objectives_arms import ARMS, REWARDS, Job, run_of
from objectives_judge import best_of_base, evaluations_to_judge, judged
from objectives_report import STOPS, report

from rpo.models.checkpoint import Checkpoint

RESULTS = Path(__file__).parent / "objectives.json"
EVALUATIONS_PER_SECOND = 450
"""Of one core, on the machine that the times were taken on."""


def train(job: Job, folder: Path) -> dict[str, Any]:
    """One run, judged at every stop; continues where an earlier call ended."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    run, stops, before = run_of(job, folder / "run"), {}, 0
    for stop in STOPS:
        updates = run.cost.updates(stop * job.budget) or (stop == STOPS[-1])
        if updates <= before:
            continue
        before, file = updates, folder / f"judged-{stop:g}.json"
        if not file.is_file():
            model, facts = run.until(updates)
            cost = run.cost.after(int(facts["updates"]))
            write(file, cost | facts | judged(model, job.images, in_full=stop == STOPS[-1]))
        stops[f"{stop:g}"] = read(file)
    result = {"settings": job.settings, "stops": stops}
    write(folder / "result.json", result)
    return result


def judge_base(images: int) -> dict[str, Any]:
    """The checkpoint as it comes, and the best of several images of it."""
    model = Checkpoint.load("shapes")
    return {"images": images, **judged(model, images, in_full=True), "best_of": best_of_base(model, images)}


def jobs_of(args: argparse.Namespace) -> Iterator[Job]:
    """What is asked for, in the order in which it is run: a whole comparison first, then further seeds."""
    for seed in args.seeds:
        for reward in args.reward:
            for arm in args.arms:
                if reward in ARMS[arm].rewards:
                    yield Job(arm, reward, seed, args.budget, args.images)


def to_do(jobs: Sequence[Job], results: dict[str, Any], *, again: bool) -> list[Job]:
    """Those that do not stand among the results with the same settings."""
    runs = results.get("runs", {})
    known = {job: runs.get(job.reward, {}).get(job.arm, {}).get(str(job.seed), {}).get("settings") for job in jobs}
    return [job for job in jobs if again or known[job] != job.settings]


def plan(jobs: Sequence[Job], waiting: Sequence[Job], workers: int) -> str:
    """What is run, and about how long it takes."""
    lines = [f"{len(jobs)} runs are asked for, {len(jobs) - len(waiting)} are finished"]
    for reward in dict.fromkeys(job.reward for job in waiting):
        for arm in dict.fromkeys(job.arm for job in waiting if job.reward == reward):
            seeds = [str(job.seed) for job in waiting if (job.reward, job.arm) == (reward, arm)]
            lines.append(f"  {reward}: {ARMS[arm].title}, seeds {', '.join(seeds)}")
    seconds = sum(seconds_of(job) for job in waiting)
    lines.append(
        f"about {seconds / 60:,.0f} minutes of one core, {seconds / 60 / workers:,.0f} with {workers} at the same time "
        f"({EVALUATIONS_PER_SECOND} evaluations a second)"
    )
    return "\n".join(lines)


def seconds_of(job: Job) -> float:
    """About how long a run takes, on one core."""
    to_judge = evaluations_to_judge(job.images, in_full=True)
    to_judge += (len(STOPS) - 1) * evaluations_to_judge(job.images, in_full=False)
    return (job.budget + to_judge) / EVALUATIONS_PER_SECOND


def compare(args: argparse.Namespace) -> None:
    """Run what is missing, each run a process, and take it into the results as it ends."""
    jobs = list(jobs_of(args))
    results = read(args.results) or {}
    waiting, lock = to_do(jobs, results, again=args.again), Lock()
    print(plan(jobs, waiting, args.workers), flush=True)
    common = [f"--folder={args.folder}", f"--images={args.images}", f"--budget={args.budget}"]

    def base() -> None:
        place = args.folder / f"base-{args.images}.json"
        if not place.is_file():
            on_one_core(__file__, ["base", *common], place.with_suffix(".log"))
        _add(args.results, read(place) or {}, lock, "base")

    def one(job: Job) -> None:
        place = job.folder(args.folder)
        if args.again or not (place / "result.json").is_file():
            words = [f"--arms={job.arm}", f"--reward={job.reward}", f"--seeds={job.seed}"]
            on_one_core(__file__, ["one", *common, *words], place.with_suffix(".log"))
        _add(args.results, read(place / "result.json") or {}, lock, "runs", job.reward, job.arm, str(job.seed))

    with ThreadPoolExecutor(args.workers) as pool:
        waits = [] if results.get("base", {}).get("images") == args.images else [pool.submit(base)]
        waits += [pool.submit(one, job) for job in waiting]
        for wait in waits:
            wait.result()


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
    parser.add_argument("--reward", choices=list(REWARDS), nargs="+", default=list(REWARDS), help="what is learnt from")
    parser.add_argument(
        "--arms", choices=list(ARMS), nargs="+", default=list(ARMS), metavar="ARM", help=", ".join(ARMS)
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=int, default=100_000, help="denoiser evaluations per run")
    parser.add_argument("--images", type=int, default=160, help="prompts of each split that a model is judged by")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time, one core each")
    parser.add_argument("--again", action="store_true", help="also what is finished")
    parser.add_argument("--folder", type=Path, default=Path("runs/objectives"), help="where runs lie")
    parser.add_argument("--results", type=Path, default=RESULTS, help="what is finished; figures are drawn beside it")
    args = parser.parse_args(argv)
    if args.part == "one":
        (job,) = jobs_of(args)
        train(job, job.folder(args.folder))
        return
    if args.part == "base":
        write(args.folder / f"base-{args.images}.json", judge_base(args.images))
        return
    if args.part == "plan":
        jobs = list(jobs_of(args))
        print(plan(jobs, to_do(jobs, read(args.results) or {}, again=args.again), args.workers))
        return
    if args.part == "compare":
        compare(args)
    report(args.results)


if __name__ == "__main__":
    main()
