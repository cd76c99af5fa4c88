"""Advantage Weighted Matching (AWM, Xue et al., arXiv:2509.25050): the denoising loss of an image, by what it is worth.

    L = A · t/p · (ℓ + ε)^p + ‖v - v_old‖² / D + λ ‖v - v_reference‖² / D,        ℓ = ‖v - v*‖² / D,  p = ¼

the authors' "ghuber" likelihood; the old policy is a moving average. So a = 2 A t (ℓ + ε)^{p-1}, b = 2 and 2λ. On
policy its ratio is 1, and the authors do not clip it. Their code loses the hold to the average when λ is 0; here the
two are apart.
"""

from collections.abc import Mapping
from dataclasses import field
from typing import ClassVar, Literal

from jaxtyping import Int
from torch import Tensor

from rpo.config.ranges import NotNegative
from rpo.config.settings import settings
from rpo.objectives.endpoint.update import Copy, LagConfig, Moments, Ranked, ReferenceWeight, Terms, Times
from rpo.types import PerSample

POWER = 0.25
"""p."""

SMALL = 1e-10
"""ε."""


@settings
class Awm:
    """AWM, as its authors run it: six times for each image, none in the last tenth."""

    kind: Literal["awm"] = "awm"

    old_weight: NotNegative = 1.0
    """Weight of the distance from the moving average."""

    reference_weight: ReferenceWeight = 1e-3
    """Weight of the distance from the reference. 1e-3 on GenEval, 3e-3 for text, 1e-4 for PickScore."""

    old: LagConfig = field(default_factory=lambda: LagConfig(decay=0.3, rise=1e-3))
    """How the moving average follows."""

    title: ClassVar[str] = "AWM"
    ranked: ClassVar[Ranked] = Ranked("group", 5.0, 1 / 5)
    times: ClassVar[Times] = Times(6, (0.0, 0.9))
    draws_with_old: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[Copy]:
        """Those that it is held to."""
        weights: dict[Copy, float] = {"old": self.old_weight, "reference": self.reference_weight}
        return frozenset(name for name, weight in weights.items() if weight)

    @property
    def lag(self) -> LagConfig | None:
        """That of the average."""
        return self.old if self.old_weight else None

    def worth(self, advantage: PerSample, errors: Mapping[str, PerSample], group: Int[Tensor, " batch"]) -> PerSample:
        """The advantage itself."""
        return advantage

    def terms(self, moments: Moments) -> Terms:
        """As above."""
        slope = moments.time * (moments.error(moments.prediction.detach()) + SMALL) ** (POWER - 1)
        weights: dict[Copy, float] = {"old": self.old_weight, "reference": self.reference_weight}
        return Terms(2 * moments.worth * slope, {name: 2 * weights[name] for name in self.needs})
