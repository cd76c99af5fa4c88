"""Advantage Weighted Matching (AWM, Xue et al., arXiv:2509.25050): the denoising loss of an image, by what it is worth.

    L = A · t/p · (ℓ + ε)^p + ‖v - v_old‖² / D + λ ‖v - v_reference‖² / D,        ℓ = ‖v - v*‖² / D,  p = ¼

the authors' "ghuber" likelihood; the old policy is a moving average. So a = 2 A t (ℓ + ε)^{p-1}, b = 2 and 2λ. Their
code loses the hold to the average when λ is 0; here the two are apart.

With a clip the likelihood is weighed by its ratio ρ to that of the moving average, as PPO has it, and a is times ρ, or
0 where ρ has left 1 ± clip in the direction of A. The authors' ratio is to the policy that drew, hence 1 on policy, and
their clip of 1 holds nothing; here an update is always on policy, so that only the ratio to the average can say
something.
"""

from dataclasses import field
from typing import ClassVar, Literal

import torch

from rpo.config.ranges import NotNegative, Positive
from rpo.config.settings import settings
from rpo.errors import InputError
from rpo.objectives.endpoint.update import (
    Copy,
    LagConfig,
    Moments,
    Ranked,
    ReferenceWeight,
    Terms,
    Times,
    clipped_by,
    held,
    own_advantage,
)

POWER = 0.25
"""p."""

SMALL = 1e-10
"""ε."""


AVERAGE = LagConfig(decay=0.3, rise=1e-3)
"""How fast the authors' moving average is."""


@settings
class Awm:
    """AWM, as its authors run it: six times for each image, none in the last tenth."""

    kind: Literal["awm"] = "awm"

    old_weight: NotNegative = 1.0
    """Weight of the distance from the moving average."""

    reference_weight: ReferenceWeight = 1e-3
    """Weight of the distance from the reference. 1e-3 on GenEval, 3e-3 for text, 1e-4 for PickScore."""

    old: LagConfig = field(default_factory=lambda: AVERAGE)
    """How the moving average follows."""

    clip: Positive | None = None
    """How far the ratio of likelihoods to the moving average may go from 1; nothing for no ratio. 1e-5 to 1e-3."""

    title: ClassVar[str] = "AWM"
    ranked: ClassVar[Ranked] = Ranked("group", 5.0, 1 / 5)
    times: ClassVar[Times] = Times(6, (0.0, 0.9))
    old_draws_after = None
    worth = staticmethod(own_advantage)

    def __post_init__(self) -> None:
        """Refuse to say how something follows that is not there."""
        if self.lag is None and self.old != AVERAGE:
            raise InputError(
                "objective.old says how the moving average follows, but objective.old_weight is 0 and there is no "
                "objective.clip, so that nothing asks it; give one of these, or leave it out"
            )

    @property
    def _holds(self) -> dict[Copy, float]:
        return held({"old": self.old_weight, "reference": self.reference_weight})

    @property
    def needs(self) -> frozenset[Copy]:
        """Those that it is held to, and the average for its ratio."""
        return frozenset({*self._holds, *(("old",) if self.clip else ())})

    @property
    def lag(self) -> LagConfig | None:
        """That of the average."""
        return self.old if "old" in self.needs else None

    def terms(self, moments: Moments) -> Terms:
        """As above."""
        error = moments.error(moments.prediction.detach())
        pull = 2 * moments.worth * moments.time * (error + SMALL) ** (POWER - 1)
        if self.clip is None:
            return Terms(pull, self._holds)
        gain = (moments.error(moments.said["old"]) + SMALL) ** POWER - (error + SMALL) ** POWER
        ratio = (moments.time / POWER * gain).exp()
        is_clipped = clipped_by(ratio, moments.worth, self.clip)
        return Terms(torch.where(is_clipped, 0.0, ratio * pull), self._holds, is_clipped=is_clipped)
