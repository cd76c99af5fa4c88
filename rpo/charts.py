"""Curves as inline SVG that takes its colours from the page, so that one drawing is right in light and in dark.

matplotlib draws with placeholder colours, which are then replaced by CSS variables. Noisy curves get a running mean on
top of the raw line, and very long ones are averaged in blocks, so that a report stays small.
"""

import io
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 400
"""Points of the raw line; longer curves are averaged in blocks."""

SMOOTHING = 15
"""The running mean covers one part in this many of the curve."""

_INK, _RULE, _QUIET = "#0a0b01", "#0a0b02", "#0a0b03"
_SERIES = tuple(f"#0a0b1{index}" for index in range(4))
_PLACEHOLDERS = {_INK: "currentColor", _RULE: "var(--rule)", _QUIET: "var(--quiet)"} | {
    color: f"var(--series-{index})" for index, color in enumerate(_SERIES)
}


@dataclass(frozen=True)
class Series:
    """One curve: its name and its points."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Mark:
    """A horizontal line that gives the curves a meaning: chance, the start, a limit."""

    label: str
    value: float


@dataclass(frozen=True)
class Chart:
    """Up to four curves over one axis, and a sentence on how to read them."""

    title: str
    series: tuple[Series, ...]
    marks: tuple[Mark, ...] = ()
    explanation: str = ""
    x_label: str = "update"


def curve(entries: Iterable[Mapping[str, float | None]], metric: str, *, name: str, x: str = "update") -> Series:
    """The points of one metric; where an entry lacks it, or has no finite number, there is none.

    Args:
        entries: Lines of a `metrics.jsonl`.
        metric: Which metric.
        name: What the curve is called in the legend.
        x: The field that counts along the horizontal axis.

    Returns:
        A curve, empty if the metric was never logged.
    """
    points = [(entry[x], entry.get(metric)) for entry in entries]
    kept = [(float(at), float(y)) for at, y in points if at is not None and y is not None and math.isfinite(y)]
    return Series(name, tuple(at for at, _ in kept), tuple(y for _, y in kept))


def draw(chart: Chart, *, name: str) -> str:
    """The chart as an `<svg>` element.

    Args:
        chart: What to draw.
        name: Unique in the page; every id in the drawing starts with it.

    Returns:
        SVG text without scripts, styles or addresses of its own.

    Raises:
        ValueError: If there is no curve, more than four, or a curve without points.
    """
    _check(chart)
    # Imported here: matplotlib takes a second, and most users of the package never draw.
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "rpo", "font.size": 9.5, "text.color": _INK}):
        figure = Figure(figsize=(5.2, 2.6), layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        for series, color in zip(chart.series, _SERIES, strict=False):
            _plot(axes, series, color)
        for mark in chart.marks:
            _rule(axes, mark)
        _dress(axes, chart.x_label)
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(buffer, metadata=no_metadata)
    return _inline(buffer.getvalue(), chart.title, name)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` neighbours, over fewer at the ends; an even window counts as the next odd one."""
    padded = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low = np.maximum(index - window // 2, 0)
    high = np.minimum(index + window // 2 + 1, len(values))
    return (padded[high] - padded[low]) / (high - low)


def _plot(axes: "Axes", series: Series, color: str) -> None:
    x, y = _blocks(np.array(series.x)), _blocks(np.array(series.y))
    window = max(1, len(y) // SMOOTHING)
    if window > 1:
        axes.plot(x, y, color=color, linewidth=1, alpha=0.28)
    axes.plot(x, running_mean(y, window), color=color, linewidth=2, solid_capstyle="round")


def _rule(axes: "Axes", mark: Mark) -> None:
    axes.axhline(mark.value, color=_QUIET, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
    axes.annotate(
        mark.label,
        (1, mark.value),
        (6, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="center",
        color=_QUIET,
        fontsize=8.5,
        annotation_clip=False,
    )


def _dress(axes: "Axes", x_label: str) -> None:
    axes.set_xlabel(x_label, color=_QUIET)
    axes.tick_params(colors=_INK, length=0)
    axes.grid(axis="y", color=_RULE, linewidth=1)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)
    axes.margins(x=0.01)
    axes.locator_params(axis="y", nbins=5)


def _blocks(values: np.ndarray) -> np.ndarray:
    size = -(-len(values) // MAX_POINTS)
    starts = np.arange(0, len(values), size)
    return np.add.reduceat(values, starts) / np.diff(np.append(starts, len(values)))


def _inline(svg: str, title: str, name: str) -> str:
    # The page is HTML: no prolog and no namespaces; matplotlib's own <style> would reach the whole page; ids such as
    # "axes_1" would repeat from chart to chart.
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)
    for color, variable in _PLACEHOLDERS.items():
        svg = svg.replace(color, variable)
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()


def _check(chart: Chart) -> None:
    if not 1 <= len(chart.series) <= len(_SERIES):
        raise ValueError(
            f"chart {chart.title!r} has {len(chart.series)} curves, but 1 to {len(_SERIES)} can be told apart; "
            "leave the chart out, or split it"
        )
    for series in chart.series:
        if not series.x or len(series.x) != len(series.y):
            raise ValueError(
                f"curve {series.name!r} has {len(series.x)} x and {len(series.y)} y, but needs as many of both and at "
                "least one; leave the curve out if it was never measured"
            )
