"""What the runs of `online_rl.py` found: one JSON file, tables and a figure."""

import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jobs import read, write

from rpo.charts import Chart, Mark, Series, draw_figure
from rpo.text import write_text

STOPS = (0.25, 0.5, 1.0)
"""Shares of the budget at which a run is judged."""
GUIDANCE = {"": 1.0, "_guided": 3.0}
"""Endings of the names of results, and the guidance that they were drawn with."""
ACCURACIES = tuple(f"{domain}{ending}" for ending in GUIDANCE for domain in ("in_domain", "out_of_domain"))
CHARTS = {"in_domain": "Verified accuracy, in-domain (%)", "kl": "KL from the base, without the last steps (nats)"}
COLUMNS = ("in-domain %", "out-of-domain %", "in-domain %, guidance 3", "out-of-domain %, guidance 3")


def report(folder: Path, titles: Mapping[str, str], compared: tuple[str, ...]) -> dict[str, Any]:
    """All results that are there, as one JSON file, tables on the terminal and a figure.

    Args:
        folder: Of all runs.
        titles: What a person calls each method.
        compared: Which of them are drawn.
    """
    base = {"steps": read(folder / "base" / "steps.json")}
    found: dict[str, Any] = {"base": read(folder / "base.json"), "runs": {"base": {"stops": {}, **base}}}
    for name in titles:
        for place in sorted(one for one in folder.glob(f"{name}-[0-9]*") if one.is_dir()):
            stops = {f"{stop:g}": read(place / f"judged-{stop:g}.json") for stop in STOPS}
            found["runs"][place.name] = {"stops": stops, "steps": read(place / "steps.json")}
    write(folder / "results.json", found)
    print("\n".join(_tables(found, titles)))
    charts = _charts(found, titles, compared)
    if charts:
        write_text(folder / "online_rl.svg", draw_figure(charts))
    return found


def _tables(found: dict[str, Any], titles: Mapping[str, str]) -> Iterator[str]:
    base = found["base"] or {}
    yield f"| method | seeds | evaluations | {' | '.join(COLUMNS)} | KL | KL, last steps | minutes |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    if base:
        yield f"| base | | 0 | {' | '.join(f'{base[key]:.1f}' for key in ACCURACIES)} | 0 | 0 | |"
    for name, title in titles.items():
        for stop in STOPS:
            done = [run for run in _stops(found, name, stop) if run]
            if done:
                numbers = [_spread([run[key] for run in done]) for key in (*ACCURACIES, "kl", "kl_last_steps")]
                cost, minutes = (statistics.mean(run[key] for run in done) for key in ("evaluations", "seconds"))
                yield (f"| {title} | {len(done)} | {cost:,.0f} | {' | '.join(numbers)} | {minutes / 60:.0f} |")
    yield ""
    for name, run in found["runs"].items():
        if run["steps"]:
            yield f"| {name} | " + " | ".join(f"{key}: {value:.1f}" for key, value in run["steps"].items()) + " |"
    for name, title in titles.items():
        for run in _stops(found, name, STOPS[-1]):
            if run and name.startswith("design"):
                shares = ", ".join("-" if part is None else f"{part:.2f}" for part in run["explained_variance"])
                yield f"| {title} | {run['in_domain']:.1f} | explained variance {shares} |"


def _charts(found: dict[str, Any], titles: Mapping[str, str], compared: tuple[str, ...]) -> list[Chart]:
    charts = []
    base = found["base"]
    for key, title in (
        ("in_domain", "Verified accuracy, in-domain (%)"),
        ("kl", "KL from the base, without the last steps (nats)"),
    ):
        series = []
        for name in compared:
            points = [[run for run in _stops(found, name, stop) if run] for stop in STOPS]
            points = [runs for runs in points if runs]
            if points:
                x = [statistics.mean(run["evaluations"] for run in runs) / 1e3 for runs in points]
                y = [statistics.mean(run[key] for run in runs) for runs in points]
                start = base[key] if base and key in base else 0.0
                series.append(Series(titles[name], (0.0, *x), (start, *y), is_noisy=False))
        if series:
            marks = (Mark("base", base[key]),) if base and key in base else ()
            charts.append(Chart(title, tuple(series), marks, x_label="thousand denoiser evaluations"))
    return charts


def _stops(found: dict[str, Any], name: str, stop: float) -> list[dict[str, Any] | None]:
    return [
        run["stops"][f"{stop:g}"]
        for key, run in found["runs"].items()
        if key.rsplit("-", 1)[0] == name and run["stops"]
    ]


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")
