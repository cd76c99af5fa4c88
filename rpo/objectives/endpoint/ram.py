"""RAM (arXiv:2605.10759, eq. 17): regress on the reference, moved by what an image is worth.

    L = ‖ v - sg[ v_reference + R (v* - v) ] ‖² / D        so a = 2R, b = 2 to the reference

The correction by the cost of the path is dropped, as in the paper: exact at the start, and the same fixed point.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

from jaxtyping import Int
from torch import Tensor

from rpo.config.ranges import Positive
from rpo.config.settings import settings
from rpo.objectives.endpoint.update import Copy, Moments, Ranked, Terms, Times
from rpo.types import PerSample


@settings
class Ram:
    """RAM: four times for each image."""

    kind: Literal["ram"] = "ram"

    strength: Positive = 1.0
    """By which R, the reward's difference from its group in units of the batch's spread, is multiplied: how far from
    the reference the policy may go."""

    title: ClassVar[str] = "RAM"
    ranked: ClassVar[Ranked] = Ranked("batch")
    times: ClassVar[Times] = Times(4)
    old_draws_after = None

    @property
    def needs(self) -> frozenset[Copy]:
        """The reference."""
        return frozenset({"reference"})

    @property
    def lag(self) -> None:
        """There is no old policy."""

    def worth(self, advantage: PerSample, errors: Mapping[str, PerSample], group: Int[Tensor, " batch"]) -> PerSample:
        """R."""
        return self.strength * advantage

    def terms(self, moments: Moments) -> Terms:
        """As above."""
        return Terms(2 * moments.worth, {"reference": 2.0})
