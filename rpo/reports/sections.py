"""What a report is made of: sections of plain data, that any trainer can fill and `rpo.reports.html` can show."""

from dataclasses import dataclass

import numpy as np

from rpo.evaluation.comparison import Interval, Outcome, PairedComparison
from rpo.evaluation.contest import Contest
from rpo.reports.charts import Chart


@dataclass(frozen=True)
class Scale:
    """How a measured number is written, and over which range it is drawn."""

    factor: float
    unit: str
    gain_unit: str
    digits: int
    low: float
    high: float

    def number(self, value: float) -> str:
        """The value as it is written, without its unit."""
        return typographic(f"{self.factor * value:.{self.digits}f}")

    def range(self, interval: Interval) -> str:
        """The ends of an interval."""
        return f"{self.number(interval.low)} to {self.number(interval.high)}"

    def gain(self, interval: Interval) -> str:
        """A difference with its sign and unit."""
        return typographic(f"{self.factor * interval.value:+.{self.digits}f}") + f" {self.gain_unit}"

    def gain_range(self, interval: Interval) -> str:
        """The ends of a difference's interval, with their signs."""
        low, high = (f"{self.factor * end:+.{self.digits}f}" for end in (interval.low, interval.high))
        return typographic(f"{low} to {high}")

    @property
    def axis(self) -> str:
        """Where drawings of the scale begin and end."""
        return typographic(f"{self.factor * self.low:g} to {self.factor * self.high:g} {self.unit}".rstrip())

    def position(self, value: float) -> float:
        """Where the value lies between `low` and `high`, in per cent of the way, never outside."""
        return round(100 * min(1.0, max(0.0, (value - self.low) / (self.high - self.low))), 2)


PERCENT = Scale(factor=100, unit="%", gain_unit="points", digits=1, low=0, high=1)
"""Shares of images."""


@dataclass(frozen=True)
class NumbersSection:
    """The few numbers that matter most, each before and after, large."""

    title: str
    rows: tuple[PairedComparison, ...]
    scale: Scale = PERCENT
    before: str = "base"
    after: str = "aligned"
    note: str = ""


@dataclass(frozen=True)
class TableGroup:
    """Rows of a table that belong together."""

    title: str
    rows: tuple[PairedComparison, ...]


@dataclass(frozen=True)
class TableSection:
    """Comparisons row by row, each with its intervals drawn."""

    title: str
    groups: tuple[TableGroup, ...]
    scale: Scale = PERCENT
    before: str = "base"
    after: str = "aligned"
    note: str = ""


@dataclass(frozen=True)
class CurvesSection:
    """How the run went, update by update."""

    title: str
    charts: tuple[Chart, ...]
    note: str = ""


@dataclass(frozen=True)
class JudgedImage:
    """One image (uint8, height × width × 3) and what the judge says of it; `holds` is None where nobody can say."""

    pixels: np.ndarray
    holds: bool | None = None
    reason: str = ""


@dataclass(frozen=True)
class ImagePair:
    """The same prompt and the same seed, before and after."""

    prompt: str
    before: JudgedImage
    after: JudgedImage
    label: str = ""


@dataclass(frozen=True)
class PairGroup:
    """Pairs with one outcome: those shown, and how many there are in all."""

    outcome: Outcome
    total: int
    pairs: tuple[ImagePair, ...]
    meaning: str = ""


@dataclass(frozen=True)
class PairsSection:
    """Images before and after, by outcome; `selection` says how the shown ones were chosen."""

    title: str
    groups: tuple[PairGroup, ...]
    selection: str
    before: str = "base"
    after: str = "aligned"


@dataclass(frozen=True)
class PreviewRow:
    """The same prompt from the same noise at two moments of a run: a strip of images each (uint8, RGB)."""

    prompt: str
    before: np.ndarray
    after: np.ndarray


@dataclass(frozen=True)
class PreviewsSection:
    """Image grids of fixed prompts and seeds, the first and the last of a run."""

    title: str
    rows: tuple[PreviewRow, ...]
    before: str
    after: str
    note: str = ""


@dataclass(frozen=True)
class ContestRow:
    """Two models by one reward, and what a person calls the line."""

    name: str
    contest: Contest


@dataclass(frozen=True)
class ContestGroup:
    """Lines by one reward, whose differences are drawn on one scale, from `scale.low` to `scale.high`."""

    title: str
    rows: tuple[ContestRow, ...]
    scale: Scale


@dataclass(frozen=True)
class ContestsSection:
    """How far models are apart, with the interval of each difference drawn around zero, and who wins how often."""

    title: str
    groups: tuple[ContestGroup, ...]
    before: str = "base"
    after: str = "this"
    note: str = ""
    lead: str = ""
    """What comes before the lines: the answer in words."""
    counts_wins: bool = True
    explains: bool = False
    """Whether it says below what is drawn; once in a page."""


@dataclass(frozen=True)
class LineupImage:
    """One model's image, and its scores in words."""

    label: str
    pixels: np.ndarray
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lineup:
    """The same prompt from the same noise by several models."""

    prompt: str
    images: tuple[LineupImage, ...]
    label: str = ""


@dataclass(frozen=True)
class LineupGroup:
    """Some of them, and what they have in common."""

    title: str
    lineups: tuple[Lineup, ...]
    meaning: str = ""


@dataclass(frozen=True)
class LineupsSection:
    """Images side by side; `selection` says how the shown ones were chosen."""

    title: str
    groups: tuple[LineupGroup, ...]
    selection: str


@dataclass(frozen=True)
class TextSection:
    """Prose: paragraphs, and terms with their explanations."""

    title: str
    paragraphs: tuple[str, ...]
    terms: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Snippet:
    """Something to copy, and what it does."""

    caption: str
    code: str


@dataclass(frozen=True)
class CommandsSection:
    """Commands and snippets."""

    title: str
    commands: tuple[Snippet, ...]
    note: str = ""


@dataclass(frozen=True)
class FactsSection:
    """Settings or environment: groups of names and values."""

    title: str
    groups: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]


@dataclass(frozen=True)
class StagesSection:
    """Where the time went: stages in order, each with its seconds."""

    title: str
    stages: tuple[tuple[str, float], ...]
    note: str = ""


Section = (
    NumbersSection
    | TableSection
    | CurvesSection
    | PairsSection
    | PreviewsSection
    | ContestsSection
    | LineupsSection
    | TextSection
    | CommandsSection
    | FactsSection
    | StagesSection
)


def typographic(number: str) -> str:
    """A number with a true minus and the sign of infinity, which also line up under each other."""
    return number.replace("-", "\N{MINUS SIGN}").replace("inf", "∞")
