"""What the runs of `online_rl.py` found: one JSON file, tables and a figure."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jobs import read, write

from rpo.evaluation.comparison import Interval, paired_gain
from rpo.files.text import write_text
from rpo.reports.charts import Chart, Mark, Series, draw_figure
from rpo.shapes.evaluate import usual_sampling

STOPS = (0.25, 0.5, 1.0)
"""Shares of the budget at which a run is judged."""

SAMPLERS = {
    f"{name}, guidance {guidance:g}": usual_sampling(seed=0, guidance_scale=guidance, **settings)
    for name, settings in {
        "DDIM 20, eta 0": {"num_steps": 20, "eta": 0.0},
        "DDIM 20, eta 1": {"num_steps": 20, "eta": 1.0},
        "uniform 10, eta 1": {"num_steps": 10, "eta": 1.0, "spacing": "uniform"},
        "DPM-Solver++ 10": {"num_steps": 10, "eta": 0.0, "solver": "dpm_solver"},
    }.items()
    for guidance in (1.0, 2.0)
}
"""By which every model is judged: deterministic and ancestral, leading and uniform steps, a second-order solver, each
with and without guidance. For the base, guidance 2 is better than 1, 3 or 5 with most of these."""

WATCHED = "DDIM 20, eta 1, guidance 2"
"""By which runs are judged on their way: the default sampler of `shapes`."""

DOMAINS = {"in_domain": "in-domain", "out_of_domain": "out-of-domain"}


def report(folder: Path, titles: Mapping[str, str], drawn: Sequence[str]) -> dict[str, Any]:
    """All results that are there, as one JSON file, tables on the terminal and a figure.

    Args:
        folder: Of all runs.
        titles: What a person calls each method, by the name of its runs.
        drawn: Names of those that the figure shows.
    """
    base = read(folder / "base.json")
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name in titles:
        places = sorted(one for one in folder.glob(f"{name}-[0-9]*") if one.is_dir())
        stops = {f"{stop:g}": [read(place / f"judged-{stop:g}.json") for place in places] for stop in STOPS}
        runs[name] = {stop: [run for run in found if run] for stop, found in stops.items()}
    found = {"base": base, "runs": runs}
    write(folder / "results.json", found)
    if base:
        print("\n".join(_tables(base, runs, titles)))
        shown = {name: runs[name] for name in drawn}
        charts = [_chart(base, shown, titles, domain) for domain in DOMAINS]
        if any(chart.series for chart in charts):
            write_text(folder / "online_rl.svg", draw_figure(charts))
    return found


def share(runs: Sequence[Mapping[str, Any]], sampler: str, split: str) -> list[float]:
    """Percent of the prompts of a split that each run draws right by a sampler."""
    return [100 * float(_holds(run, sampler, split).mean()) for run in runs]


def best_sampler(runs: Sequence[Mapping[str, Any]]) -> str:
    """By which most training prompts come out right, over all runs."""
    return max(SAMPLERS, key=lambda sampler: statistics.mean(share(runs, sampler, "train")))


def gain(
    base: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], domain: str, samplers: tuple[str, str]
) -> Interval:
    """Points over the base, each by its sampler, paired by prompt; the seeds of a method are images of one prompt."""
    before = _holds(base, samplers[0], domain)
    after = np.concatenate([_holds(run, samplers[1], domain) for run in runs])
    prompts = list(range(len(before))) * len(runs)
    return paired_gain(np.tile(before, len(runs)), after, groups=prompts, seed=0)


def _holds(run: Mapping[str, Any], sampler: str, split: str) -> np.ndarray:
    return np.array([digit == "1" for digit in run["verdicts"][sampler][split]])


def _tables(base: dict[str, Any], runs: Any, titles: Mapping[str, str]) -> Iterator[str]:
    done = {"base": [base], **{name: stops[f"{STOPS[-1]:g}"] for name, stops in runs.items()}}
    done = {name: some for name, some in done.items() if some}
    names = {"base": "base", **titles}
    for domain, title in DOMAINS.items():
        yield f"| {title}, % | {' | '.join(names[name] for name in done)} |"
        yield "|---" * (len(done) + 1) + "|"
        for sampler in SAMPLERS:
            yield f"| {sampler} | {' | '.join(_spread(share(some, sampler, domain)) for some in done.values())} |"
        chosen = {name: best_sampler(some) for name, some in done.items()}
        cells = [f"**{_spread(share(some, chosen[name], domain))}**" for name, some in done.items()]
        yield f"| best by training prompts | {' | '.join(cells)} |"
        for what, samplers in (
            ("gain, each at its best", {name: (chosen["base"], own) for name, own in chosen.items()}),
            (f"gain, both by {WATCHED}", dict.fromkeys(done, (WATCHED, WATCHED))),
        ):
            gains = [_points(gain(base, done[name], domain, pair)) for name, pair in samplers.items() if name != "base"]
            yield f"| {what} | | {' | '.join(gains)} |"
        yield ""
    yield "best by training prompts: " + "; ".join(
        f"{names[name]}: {best_sampler(some)}" for name, some in done.items()
    )
    yield ""
    yield f"| method | evaluations | in-domain % by {WATCHED} | out-of-domain % | KL | KL, last steps | minutes |"
    yield "|---|---|---|---|---|---|---|"
    for name, stops in runs.items():
        for some in filter(None, stops.values()):
            numbers = [_spread(share(some, WATCHED, domain)) for domain in DOMAINS]
            numbers += [_spread([run[key] for run in some]) for key in ("kl", "kl_last_steps")]
            cost, seconds = (statistics.mean(run[key] for run in some) for key in ("evaluations", "seconds"))
            yield f"| {titles[name]} | {cost:,.0f} | {' | '.join(numbers)} | {seconds / 60:.0f} |"


def _chart(base: dict[str, Any], runs: Any, titles: Mapping[str, str], domain: str) -> Chart:
    start, series = share([base], WATCHED, domain)[0], []
    for name, stops in runs.items():
        found = [some for some in stops.values() if some]
        if found:
            x = [statistics.mean(run["evaluations"] for run in some) / 1e3 for some in found]
            y = [statistics.mean(share(some, WATCHED, domain)) for some in found]
            series.append(Series(titles[name], (0.0, *x), (start, *y), is_noisy=False))
    title = f"Verified accuracy, {DOMAINS[domain]} (%), {WATCHED}"
    return Chart(title, tuple(series), (Mark("base", start),), x_label="thousand denoiser evaluations")


def _points(interval: Interval) -> str:
    value, low, high = (100 * number for number in (interval.value, interval.low, interval.high))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")
