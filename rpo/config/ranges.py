"""What a value of a settings object may be, as part of its type: `updates: Count`, `Annotated[float, Range(above=1)]`.

`@settings` and configurations refuse any other value where it is set. NaN is in no range, infinity only in those that
say so.
"""

import math
import operator
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

LARGEST = 10**9
"""More than anything here is counted in, and more than any weight or width that means something."""


_IS_WITHIN = {
    "exclusiveMinimum": operator.gt,
    "minimum": operator.ge,
    "exclusiveMaximum": operator.lt,
    "maximum": operator.le,
}


@dataclass(frozen=True)
class Range:
    """The numbers between two bounds, each of which may be left out."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    other_than: float | None = None
    or_inf: bool = False
    """Whether infinity means something."""

    def __contains__(self, number: float) -> bool:
        """Whether a setting may be this number."""
        if not abs(number) <= sys.float_info.max:  # infinity, NaN, and whole numbers beyond every float
            return self.or_inf and number == math.inf
        return number != self.other_than and all(_IS_WITHIN[word](number, at) for word, at in self.json_schema.items())

    @property
    def json_schema(self) -> dict[str, float]:
        """The bounds, as JSON schema has them."""
        bounds = zip(_IS_WITHIN, (self.above, self.at_least, self.below, self.at_most), strict=True)
        return {word: bound for word, bound in bounds if bound is not None}

    def __str__(self) -> str:
        """As it follows "a number"."""
        bounds = {"above": self.above, "of at least": self.at_least, "below": self.below, "of at most": self.at_most}
        named = [f"{word} {_plain(bound)}" for word, bound in bounds.items() if bound is not None]
        if self.at_least is not None and self.at_most is not None:
            named = [f"from {_plain(self.at_least)} to {_plain(self.at_most)}"]
        named += [f"other than {_plain(self.other_than)}"] if self.other_than is not None else []
        return (" and ".join(named) or "that is finite") + (", or inf" if self.or_inf else "")


@dataclass(frozen=True)
class NotEmpty:
    """Text that is more than blanks, and lists and mappings with something in them."""

    def __contains__(self, value: Any) -> bool:
        """Whether a setting may be this value."""
        return bool(value.strip() if isinstance(value, str) else value)

    def __str__(self) -> str:
        """As it follows "text"."""
        return "that is not empty"


def _plain(number: float) -> str:
    if abs(number) == LARGEST:
        return "-1e9" if number < 0 else "1e9"
    return str(int(number)) if number == int(number) else str(number)


LARGEST_SEED = 2**32 - 1
"""What torch, NumPy and accelerate all take."""

Text = Annotated[str, NotEmpty()]
Count = Annotated[int, Range(at_least=1, at_most=LARGEST)]
WholeNumber = Annotated[int, Range(at_least=0, at_most=LARGEST)]
Seed = Annotated[int, Range(at_least=0, at_most=LARGEST_SEED)]
Finite = Annotated[float, Range(at_least=-LARGEST, at_most=LARGEST)]
Positive = Annotated[float, Range(above=0, at_most=LARGEST)]
PositiveOrInf = Annotated[float, Range(above=0, at_most=LARGEST, or_inf=True)]
NotNegative = Annotated[float, Range(at_least=0, at_most=LARGEST)]
LearningRate = Annotated[float, Range(above=0, at_most=1)]
Side = Annotated[int, Range(at_least=8, at_most=100_000)]
"""Of an image, in pixels."""
Fraction = Annotated[float, Range(at_least=0, at_most=1)]
BelowOne = Annotated[float, Range(at_least=0, below=1)]
Cosine = Annotated[float, Range(at_least=-1, at_most=1)]
Weight = Annotated[float, Range(at_least=-LARGEST, at_most=LARGEST, other_than=0)]
Weights = Annotated[Mapping[str, Weight], NotEmpty()]
Names = Annotated[tuple[Text, ...], NotEmpty()]
GuidanceScale = Annotated[float, Range(at_least=1, at_most=1000)]
"""1 is no guidance."""
