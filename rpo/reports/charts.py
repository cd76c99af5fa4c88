"""Curves as SVG: inline, in the colours of the page around it, or as a figure in a file of its own.

matplotlib draws with placeholder colours. In a page they become CSS variables, so that one drawing is right in light
and in dark; in a file they become plain colours on white, since viewers of files know no variables. Noisy curves get a
running mean on top of the raw line, and very long ones are averaged in blocks, so that a report stays small.
"""

import io
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rpo.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_POINTS = 400
"""Points of the raw line; longer curves are averaged in blocks."""

SMOOTHING = 15
"""The running mean covers one part in this many of the curve."""

_INK, _RULE, _QUIET = "#0a0b01", "#0a0b02", "#0a0b03"
_SERIES = tuple(f"#0a0b1{index}" for index in range(4))
_PAGE = {_INK: "currentColor", _RULE: "var(--rule)", _QUIET: "var(--quiet)"} | {
    color: f"var(--series-{index})" for index, color in enumerate(_SERIES)
}
_FILE = {_INK: "#1d1c1a", _RULE: "#e5e1da", _QUIET: "#6f6a63"} | dict(
    zip(_SERIES, ("#4257d6", "#c2702a", "#2b8a78", "#a2479b"), strict=True)
)
# What viewers have, instead of the font that matplotlib brings; it is about as wide or narrower.
_FILE_FONT = "Inter, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"

_LINE_CHARACTERS = 72

_STYLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "rpo", "font.size": 9.5, "text.color": _INK}


@dataclass(frozen=True)
class Series:
    """One curve: its name, its points, and whether a running mean tells more than they do."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    is_noisy: bool = True


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
    is_log: bool = False
    """Whether x grows by factors; then it is above 0."""
    ticks: tuple[float, ...] = ()
    """What x is marked at, where it has few values; nothing leaves it to the drawing."""


def curve(entries: Iterable[Mapping[str, float | None]], metric: str, *, name: str, x: str = "update") -> Series:
    """The points of one metric; where an entry lacks it, or has no finite number, there is none.

    Returns:
        A curve, empty if the metric was never logged.
    """
    points = [(entry[x], entry.get(metric)) for entry in entries]
    kept = [(float(at), float(y)) for at, y in points if at is not None and y is not None and math.isfinite(y)]
    return Series(name, tuple(at for at, _ in kept), tuple(y for _, y in kept))


def draw(chart: Chart, *, name: str) -> str:
    """The chart as an `<svg>` element.

    Args:
        name: Unique in the page; every id in the drawing starts with it.

    Returns:
        SVG text without scripts, styles or addresses of its own.
    """
    # Imported here: matplotlib takes a second, and most users of the package never draw.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 2.6), layout="constrained", facecolor="none")
        _fill(figure.add_subplot(facecolor="none"), chart)
        svg = _print(figure)
    return _inline(svg, chart.title, name)


def draw_figure(charts: Sequence[Chart]) -> str:
    """The charts side by side, with titles, explanations and legends, as the text of an SVG file.

    Args:
        charts: What to draw, from left to right; up to three stay readable.
    """
    if not charts:
        raise InputError("there are 0 charts, but a figure shows at least one; leave the figure out")
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with rc_context(_STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12, wspace=0.04)
        figure = Figure(figsize=(5.4 * len(charts), 3.9), layout=layout, facecolor="white")
        lines = max(len(_lines(chart)) for chart in charts)
        for axes, chart in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
            _fill(axes, chart)
            _caption(axes, chart, lines)
        svg = _print(figure)
    return re.sub(r"font-family: [^;\"]*", f"font-family: {_FILE_FONT}", _colored(svg, _FILE))


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` neighbours, over fewer at the ends; an even window counts as the next odd one."""
    padded = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low = np.maximum(index - window // 2, 0)
    high = np.minimum(index + window // 2 + 1, len(values))
    return (padded[high] - padded[low]) / (high - low)


def _fill(axes: "Axes", chart: Chart) -> None:
    _check(chart)
    for series, color in zip(chart.series, _SERIES, strict=False):
        _plot(axes, series, color)
    for mark in chart.marks:
        _rule(axes, mark)
    if chart.is_log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    if chart.ticks:
        axes.minorticks_off()
        axes.set_xticks(chart.ticks, [f"{tick:g}" for tick in chart.ticks])
    _dress(axes, chart.x_label)


def _plot(axes: "Axes", series: Series, color: str) -> None:
    x, y = _blocks(np.array(series.x)), _blocks(np.array(series.y))
    window = max(1, len(y) // SMOOTHING) if series.is_noisy else 1
    if window > 1:
        axes.plot(x, y, color=color, linewidth=1, alpha=0.28)
    axes.plot(x, running_mean(y, window), color=color, linewidth=2, solid_capstyle="round", label=series.name)


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


def _caption(axes: "Axes", chart: Chart, lines: int) -> None:
    axes.set_title(chart.title, loc="left", fontsize=12, fontweight="bold", pad=16 + 13 * lines)
    text = axes.annotate(
        "\n".join(_lines(chart)),
        (0, 1),
        (0, 12 + 13 * lines),
        xycoords="axes fraction",
        textcoords="offset points",
        va="top",
        color=_QUIET,
        linespacing=1.25,
    )
    text.set_in_layout(False)  # the title's padding is its room; counted itself, it would narrow the axes
    axes.legend(handlelength=1.4, framealpha=0.9, facecolor="white", edgecolor="none")


def _lines(chart: Chart) -> list[str]:
    return textwrap.wrap(chart.explanation, _LINE_CHARACTERS)


def _print(figure: "Figure") -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(buffer, metadata=no_metadata)
    return buffer.getvalue()


def _colored(svg: str, colors: Mapping[str, str]) -> str:
    for placeholder, color in colors.items():
        svg = svg.replace(placeholder, color)
    return svg


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
    svg = _colored(svg, _PAGE)
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()


def _check(chart: Chart) -> None:
    if not 1 <= len(chart.series) <= len(_SERIES):
        raise InputError(
            f"chart {chart.title!r} has {len(chart.series)} curves, but 1 to {len(_SERIES)} can be told apart; "
            "leave the chart out, or split it"
        )
    for series in chart.series:
        if not series.x or len(series.x) != len(series.y):
            raise InputError(
                f"curve {series.name!r} has {len(series.x)} x and {len(series.y)} y, but needs as many of both and at "
                "least one; leave the curve out if it was never measured"
            )
