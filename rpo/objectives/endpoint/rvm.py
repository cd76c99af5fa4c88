"""RVM (arXiv:2608.23664): the denoising loss with a sign.

    L = A ‖v - v*‖² / D + λ ‖v - v_reference‖² / D,        A = 0.1 clip((r - mean of the group) / std of the batch, ±5)

so a = 2A and b = 2λ. Written as a loss it has no lower bound; its gradient is all that is used here.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

from jaxtyping import Int
from torch import Tensor

from rpo.config.settings import settings
from rpo.objectives.endpoint.update import Copy, Moments, Ranked, ReferenceWeight, Terms, Times
from rpo.types import PerSample


@settings
class Rvm:
    """RVM: one time for each image, anywhere."""

    kind: Literal["rvm"] = "rvm"

    reference_weight: ReferenceWeight = 0.0
    """Weight of the distance from the reference."""

    title: ClassVar[str] = "RVM"
    ranked: ClassVar[Ranked] = Ranked("batch", 5.0, 0.1)
    times: ClassVar[Times] = Times(1)
    draws_with_old: ClassVar[bool] = False

    @property
    def lag(self) -> None:
        """There is no old policy."""

    @property
    def needs(self) -> frozenset[Copy]:
        """The reference, if it counts."""
        return frozenset({"reference"} if self.reference_weight else ())

    def worth(self, advantage: PerSample, errors: Mapping[str, PerSample], group: Int[Tensor, " batch"]) -> PerSample:
        """The advantage itself."""
        return advantage

    def terms(self, moments: Moments) -> Terms:
        """As above."""
        return Terms(2 * moments.worth, {name: 2 * self.reference_weight for name in self.needs})
