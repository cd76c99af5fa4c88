"""What the runs of `rpo_ablation.py` found: one JSON file, tables and a figure of the gains, seed by seed."""

import io
import re
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from jobs import read, write
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from rpo.files.text import write_text

DOMAINS = {"in_domain": "in-domain", "out_of_domain": "out-of-domain"}
VERDICTS = ("better", "equal", "worse")
COLORS = ("#4257d6", "#c2702a")
CHOSEN_ERROR = "dpo/chosen_error_ratio"
FEWEST_RUNS = 6
"""With fewer a rank correlation says nothing."""


def report(folder: Path, parts: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """All results that are there, as one JSON file, tables on the terminal and a figure for each part.

    Args:
        folder: Of all runs.
        parts: For each table, what a person calls each arm.
    """
    names = dict.fromkeys(["base", *(name for titles in parts.values() for name in titles)])
    found: dict[str, Any] = {"yields": _by_seed(folder, "data", "yields.json")}
    found["runs"] = {name: runs for name in names if (runs := _by_seed(folder, name, "judged.json"))}
    write(folder / "results.json", found)
    for part, titles in parts.items():
        print("\n".join([*_table(found["runs"], titles), "", *_holding(found["runs"], titles)]))
        rows = {title: _gains(found["runs"], name) for name, title in titles.items() if name in found["runs"]}
        if rows:
            write_text(folder / f"rpo_{part}.svg", _figure(rows))
    print("\n".join(_yields(found["yields"])))
    return found


def _by_seed(folder: Path, name: str, file: str) -> dict[str, Any]:
    places = sorted(place for place in folder.glob(f"{name}-*") if re.fullmatch(rf"{name}-\d+", place.name))
    results = {place.name.rsplit("-", 1)[1]: read(place / file) for place in places}
    return {seed: result for seed, result in results.items() if result is not None}


def _table(runs: Mapping[str, Any], titles: Mapping[str, str]) -> Iterator[str]:
    """Means over seeds with their standard deviation; the gain is that over the base with the same noise."""
    yield "| | pairs | in-domain % | gain | out-of-domain % | gain | proxy, in-domain | chosen error | seeds |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, title in {"base": "base", **titles}.items():
        some = runs.get(name, {})
        if not some:
            continue
        cells = [f"{statistics.mean(one['pairs'] for one in some.values()):.0f}" if name != "base" else ""]
        gains = _gains(runs, name)
        for domain in DOMAINS:
            cells.append(_spread([one[domain] for one in some.values()]))
            cells.append(_spread(gains[domain], "+.1f") if name != "base" else "")
        cells.append(_spread([one["in_domain_proxy"] for one in some.values()], ".3f"))
        errors = [one["metrics"].get(CHOSEN_ERROR) for one in some.values()] if name != "base" else []
        cells.append(_spread([error for error in errors if error is not None], ".2f"))
        yield f"| {title} | {' | '.join(cells)} | {len(some)} |"


def _holding(runs: Mapping[str, Any], titles: Mapping[str, str]) -> Iterator[str]:
    """How far gains follow from whether the chosen side was held in place."""
    base = runs.get("base", {})
    both = [(one, base[seed]) for name in titles for seed, one in runs.get(name, {}).items() if seed in base]
    rows = [(one, start) for one, start in both if one["metrics"].get(CHOSEN_ERROR) is not None]
    if len(rows) < FEWEST_RUNS:
        return
    errors = [one["metrics"][CHOSEN_ERROR] for one, _ in rows]
    by_domain = {name: [one[domain] - start[domain] for one, start in rows] for domain, name in DOMAINS.items()}
    ranks = {name: float(spearmanr(errors, gains).statistic) for name, gains in by_domain.items()}
    numbers = ", ".join(f"{name} {rank:.2f}" for name, rank in ranks.items())
    yield f"chosen error and gain over {len(rows)} runs, rank correlation: {numbers}\n"


def _gains(runs: Mapping[str, Any], name: str) -> dict[str, list[float]]:
    """Points of accuracy over the base, by domain; only seeds that both have."""
    base = runs.get("base", {})
    both = [(one, base[seed]) for seed, one in runs.get(name, {}).items() if seed in base]
    return {domain: [one[domain] - start[domain] for one, start in both] for domain in DOMAINS}


def _spread(values: list[float], form: str = ".1f") -> str:
    if not values:
        return ""
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {format(statistics.stdev(values), form.lstrip('+'))}" if len(values) > 1 else mean


def _yields(found: Mapping[str, Any]) -> Iterator[str]:
    for run in ("rich", "blind"):
        some = [one[run] for one in found.values()]
        if some:
            stages = {name: statistics.mean(one["stages"][name] for one in some) for name in some[0]["stages"]}
            passed = _counts(stages)
            pairs = statistics.mean(one["pairs"] for one in some)
            verdicts = {name: statistics.mean(one.get(name, 0) for one in some) for name in VERDICTS}
            yield f"{run}: {passed}, pairs {pairs:.0f}; the verifier finds the edit {_counts(verdicts)}"
            reasons = {name for one in some for name in one["dropped"]}
            means = {name: statistics.mean(one["dropped"].get(name, 0) for one in some) for name in reasons}
            yield "  dropped: " + _counts(dict(sorted(means.items(), key=lambda item: -item[1])))


def _counts(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.0f}" for name, value in numbers.items())


def _figure(rows: Mapping[str, Mapping[str, list[float]]]) -> str:
    """Gains of every arm: a dot for each seed, a bar for their mean."""
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "rpo", "font.size": 9.5, "font.family": "sans-serif"}
    with mpl.rc_context(style):
        figure = Figure(figsize=(8.2, 0.9 + 0.42 * len(rows)), layout="constrained")
        axes = figure.subplots()
        places = range(len(rows))
        for shift, (domain, name) in enumerate(DOMAINS.items()):
            heights = [place + 0.36 * (shift - 0.5) for place in places]
            values = [gains[domain] for gains in rows.values()]
            means = [statistics.mean(some) if some else 0.0 for some in values]
            axes.barh(heights, means, height=0.32, color=COLORS[shift], alpha=0.35, label=name)
            dots = [(one, height) for some, height in zip(values, heights, strict=True) for one in some]
            if dots:
                axes.scatter(*zip(*dots, strict=True), s=11, color=COLORS[shift], zorder=3)
        axes.set_yticks(list(places), list(rows))
        axes.invert_yaxis()
        axes.axvline(0, color="#6f6a63", linewidth=0.8)
        axes.set_xlabel("points of verified accuracy over the base; a dot for each seed")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        figure.legend(loc="outside upper right", ncols=2, frameon=False)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()
