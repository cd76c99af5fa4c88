"""What the runs of `objectives.py` found: tables and figures of all results that are there."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jobs import read, write
from objectives_arms import ARMS, REWARDS
from objectives_judge import BEST_OF, HELD_OUT, SAMPLERS, WATCHED, unpack

from rpo.evaluation.comparison import Interval, paired_gain
from rpo.files.text import write_text
from rpo.reports.charts import Chart, Mark, Series, draw_figure

STOPS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Shares of the budget at which a run is judged."""

BAR = "ddpo"
"""Whose accuracy at the end the others are to reach."""

DOMAINS = {"in_domain": "in-domain", "out_of_domain": "out-of-domain"}


def report(file: Path) -> dict[str, Any]:
    """Add the tables to the results, print them, and draw the figures beside them.

    Args:
        file: Of all results.
    """
    results = read(file) or {}
    if "base" not in results or not results.get("runs"):
        return results
    results["tables"] = {}
    for reward in [one for one in REWARDS if results["runs"].get(one)]:
        runs = {arm: list(results["runs"][reward].get(arm, {}).values()) for arm in ARMS}
        found = {arm: some for arm, some in runs.items() if some}
        results["tables"][reward] = {name: "\n".join(lines) for name, lines in tables(results["base"], found, reward)}
        for name, table in results["tables"][reward].items():
            print(f"\n{reward}, {name}\n\n{table}")
        for name, charts in figures(results["base"], found, reward):
            write_text(file.parent / f"{file.stem}_{reward}_{name}.svg", draw_figure(charts))
    write(file, results)
    return results


def share(runs: Sequence[Mapping[str, Any]], sampler: str, *splits: str) -> list[float]:
    """Percent of the prompts of some splits that each judged model draws right by a sampler."""
    return [100 * float(np.concatenate([_holds(run, sampler, split) for split in splits]).mean()) for run in runs]


def best_sampler(runs: Sequence[Mapping[str, Any]]) -> str:
    """By which most training prompts come out right, over all judged models."""
    return max(SAMPLERS, key=lambda sampler: statistics.mean(share(runs, sampler, "train")))


def gain(
    base: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], domain: str, samplers: tuple[str, str]
) -> Interval:
    """Points over the base, each by its sampler, paired by prompt; the seeds of an arm are images of one prompt."""
    before = _holds(base, samplers[0], domain)
    after = np.concatenate([_holds(run, samplers[1], domain) for run in runs])
    prompts = list(range(len(before))) * len(runs)
    return paired_gain(np.tile(before, len(runs)), after, groups=prompts, seed=0)


def crossing(points: Sequence[tuple[float, float]], level: float) -> float | None:
    """Where a curve first reaches a level, on straight lines between its points; None where it never does.

    Args:
        points: (x, y) by rising x.
    """
    before: tuple[float, float] | None = None
    for x, y in points:
        if y >= level:
            if before is None:
                return x
            return before[0] + (x - before[0]) * (level - before[1]) / (y - before[1])
        before = x, y
    return None


def curve(base: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], *splits: str) -> list[tuple[float, float]]:
    """Evaluations and percent right by the watched sampler, from the base on: means over the seeds at every stop."""
    points = [(0.0, share([base], WATCHED, *splits)[0])]
    for some in _by_stop(runs):
        points.append((statistics.mean(one["evaluations"] for one in some), _mean(share(some, WATCHED, *splits))))
    return points


def tables(base: Mapping[str, Any], runs: Mapping[str, Any], reward: str) -> Iterator[tuple[str, Iterator[str]]]:
    """(name, lines of Markdown) of what is said of one reward."""
    yield "accuracy", _accuracy(base, runs, reward)
    yield "cost", _cost(base, runs, reward)
    yield "samplers", _by_sampler(base, runs)
    yield "settings", _settings(runs)


def _accuracy(base: Mapping[str, Any], runs: Mapping[str, Any], reward: str) -> Iterator[str]:
    """A row for each arm, the best first."""
    columns = ("in-domain / out-of-domain %, watched", "own sampler", "best sampler")
    columns += ("gain by the watched, in-domain", "out-of-domain", "gain at the best, in-domain", "out-of-domain")
    yield f"| arm | seeds | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 2) + "|"
    own = best_sampler([base])
    yield f"| base | | {_both([base], WATCHED)} | {_both([base], ARMS[BAR].sampler)} | {_both([base], own)} | | | | |"
    bar = {"verdicts": {WATCHED: base["best_of"][reward]["verdicts"]}}
    gains = [_points(gain(base, [bar], domain, (before, WATCHED))) for before in (WATCHED, own) for domain in HELD_OUT]
    yield f"| base, best of {BEST_OF} | | {_both([bar], WATCHED)} | | | {' | '.join(gains)} |"
    ends = {arm: [_last(run) for run in some] for arm, some in runs.items()}
    chosen = {arm: best_sampler(some) for arm, some in ends.items()}
    for arm in sorted(ends, key=lambda arm: -_mean(share(ends[arm], chosen[arm], *HELD_OUT))):
        some = ends[arm]
        pairs = ((WATCHED, WATCHED), (own, chosen[arm]))
        gains = [_points(gain(base, some, domain, samplers)) for samplers in pairs for domain in HELD_OUT]
        yield (
            f"| {ARMS[arm].title} | {len(some)} | {_both(some, WATCHED)} | {_both(some, ARMS[arm].sampler)} | "
            f"**{_both(some, chosen[arm])}** | {' | '.join(gains)} |"
        )


def _cost(base: Mapping[str, Any], runs: Mapping[str, Any], reward: str) -> Iterator[str]:
    """A row for each arm, the soonest first."""
    yield (
        "| arm | evaluations to DDPO's end | evaluations | images scored | minutes | KL | last steps | diversity "
        "| gold | proxy |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    yield f"| base | | | | | 0 | 0 | {base['diversity']:.4f} | {_scores([base], 'gold')} | {_scores([base], 'proxy')} |"
    bar = base["best_of"][reward]
    yield f"| base, best of {BEST_OF} | | | | | 0 | 0 | | {_scores([bar], 'gold')} | {_scores([bar], 'proxy')} |"
    level = curve(base, runs[BAR], *HELD_OUT)[-1][1] if BAR in runs else None
    reached = {arm: level and crossing(curve(base, some, *HELD_OUT), level) for arm, some in runs.items()}
    for arm in sorted(runs, key=lambda arm: (reached[arm] is None, reached[arm] or 0.0)):
        some, at = [_last(run) for run in runs[arm]], reached[arm]
        cost, images, seconds = (
            _mean([one[key] for one in some]) for key in ("evaluations", "images_scored", "seconds")
        )
        yield (
            f"| {ARMS[arm].title} | {'–' if at is None else f'{at:,.0f}'} | {cost:,.0f} | {images:,.0f} | "
            f"{seconds / 60:.1f} | {_spread([one['kl'] for one in some], 2)} | "
            f"{_spread([one['kl_last_steps'] for one in some], 1)} | "
            f"{_spread([one['diversity'] for one in some], 4)} | {_scores(some, 'gold')} | {_scores(some, 'proxy')} |"
        )


def _by_sampler(base: Mapping[str, Any], runs: Mapping[str, Any]) -> Iterator[str]:
    """A row for each arm, a column for each sampler, in-domain and out-of-domain."""
    yield f"| in-domain / out-of-domain % | {' | '.join(SAMPLERS)} | best by training prompts |"
    yield "|---" * (len(SAMPLERS) + 2) + "|"
    every = {"base": [base], **{ARMS[arm].title: [_last(run) for run in some] for arm, some in runs.items()}}
    for title, some in every.items():
        cells = [
            f"{_mean(share(some, name, 'in_domain')):.1f} / {_mean(share(some, name, 'out_of_domain')):.1f}"
            for name in SAMPLERS
        ]
        yield f"| {title} | {' | '.join(cells)} | {best_sampler(some)} |"


def _settings(runs: Mapping[str, Any]) -> Iterator[str]:
    """A row for each arm: the command, and what is not as in its configuration of `shapes`."""
    yield "| arm | command | what is not as in its configuration of shapes |"
    yield "|---|---|---|"
    for arm, some in runs.items():
        words = " ".join(f"`{word}`" for word in some[0]["settings"]["overrides"])
        yield f"| {ARMS[arm].title} | `{some[0]['settings']['command']}` | {words} |"


def figures(base: Mapping[str, Any], runs: Mapping[str, Any], reward: str) -> Iterator[tuple[str, list[Chart]]]:
    """(name, charts side by side): accuracy against evaluations, and gold against proxy where that was learnt from."""
    families = [family for family in _families(runs).items() if family[1]]
    for number, few in enumerate((families[:2], families[2:]), start=1):
        if few:
            yield f"accuracy_{number}", [_accuracy_chart(base, runs, *family) for family in few]
        if few and reward == "proxy":
            yield f"gold_{number}", [_gold_chart(base, runs, *family) for family in few]


def _accuracy_chart(base: Mapping[str, Any], runs: Mapping[str, Any], family: str, arms: Sequence[str]) -> Chart:
    marks = {"base": share([base], WATCHED, *HELD_OUT)[0]}
    if BAR in runs:
        marks[ARMS[BAR].title] = curve(base, runs[BAR], *HELD_OUT)[-1][1]
    points = {arm: [(x / 1e3, y) for x, y in curve(base, runs[arm], *HELD_OUT)[1:]] for arm in arms}
    return Chart(
        f"Accuracy (%): {family}",
        tuple(_series(arm, some) for arm, some in points.items()),
        tuple(Mark(*mark) for mark in marks.items()),
        "Of both domains' held-out prompts, 20 ancestral steps at guidance 2.",
        x_label="thousand denoiser evaluations",
        is_log=True,
    )


def _gold_chart(base: Mapping[str, Any], runs: Mapping[str, Any], family: str, arms: Sequence[str]) -> Chart:
    return Chart(
        f"Gold against proxy: {family}",
        tuple(_series(arm, _gold(base, runs[arm])) for arm in arms),
        (Mark("base", 100 * _both_domains(base, "gold")),),
        "The verifier's graded score (×100) against the score that was learnt from.",
        x_label="proxy score",
    )


def _gold(base: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Proxy and gold score of the base, and at every stop."""
    judged = [[base], *_by_stop(runs)]
    means = [{key: _mean([_both_domains(one, key) for one in some]) for key in ("proxy", "gold")} for some in judged]
    return [(one["proxy"], 100 * one["gold"]) for one in means]


def _both_domains(one: Mapping[str, Any], key: str) -> float:
    return _mean(list(one[key].values()))


def _families(runs: Mapping[str, Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {arm.family: [] for arm in ARMS.values()}
    for arm in runs:
        found[ARMS[arm].family].append(arm)
    return found


def _series(arm: str, points: Sequence[tuple[float, float]]) -> Series:
    return Series(ARMS[arm].title, tuple(x for x, _ in points), tuple(y for _, y in points), is_noisy=False)


def _by_stop(runs: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The judged models of all seeds at each stop that all of them have."""
    shared = [name for name in (f"{stop:g}" for stop in STOPS) if all(name in run["stops"] for run in runs)]
    return [[run["stops"][name] for run in runs] for name in shared]


def _last(run: Mapping[str, Any]) -> Mapping[str, Any]:
    return run["stops"][f"{STOPS[-1]:g}"]


def _holds(run: Mapping[str, Any], sampler: str, split: str) -> np.ndarray:
    return unpack(run["verdicts"][sampler][split])


def _both(runs: Sequence[Mapping[str, Any]], sampler: str) -> str:
    return " / ".join(_spread(share(runs, sampler, split), 1) for split in HELD_OUT)


def _scores(runs: Sequence[Mapping[str, Any]], which: str) -> str:
    return _spread([_both_domains(one, which) for one in runs], 3 if which == "gold" else 2)


def _points(interval: Interval) -> str:
    value, low, high = (100 * number for number in (interval.value, interval.low, interval.high))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def _spread(values: Sequence[float], digits: int) -> str:
    more = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{_mean(values):.{digits}f}{more}"


def _mean(values: Sequence[float]) -> float:
    return statistics.mean(values)
