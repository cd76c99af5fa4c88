"""RVM (arXiv:2608.23664): the denoising loss with a sign.

    L = A ‖v - v*‖² / D + λ ‖v - v_reference‖² / D,        A = 0.1 clip((r - mean of the group) / std of the batch, ±5)

so a = 2A and b = 2λ. Written as a loss it has no lower bound; its gradient is all that is used here.
"""

from typing import ClassVar, Literal

from rpo.config.settings import settings
from rpo.objectives.endpoint.update import (
    Copy,
    Moments,
    Ranked,
    ReferenceWeight,
    Terms,
    Times,
    held,
    own_advantage,
)


@settings
class Rvm:
    """RVM: one time for each image, anywhere."""

    kind: Literal["rvm"] = "rvm"

    reference_weight: ReferenceWeight = 0.0
    """Weight of the distance from the reference."""

    title: ClassVar[str] = "RVM"
    ranked: ClassVar[Ranked] = Ranked("batch", 5.0, 0.1)
    times: ClassVar[Times] = Times(1)
    old_draws_after = None
    worth = staticmethod(own_advantage)

    @property
    def lag(self) -> None:
        """There is no old policy."""

    @property
    def needs(self) -> frozenset[Copy]:
        """The reference, if it counts."""
        return frozenset(held({"reference": self.reference_weight}))

    def terms(self, moments: Moments) -> Terms:
        """As above."""
        return Terms(2 * moments.worth, held({"reference": self.reference_weight}))
