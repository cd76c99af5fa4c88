"""Direct Group Preference Optimization (DGPO, Luo et al., arXiv:2510.08425): DPO's weight for a whole group of images.

With ℓ = ‖v - v*‖² / D at the same time and noise for all K images of a group,

    S = β/K Σ_i A_i (sg ℓ_i - ℓ_reference,i),        L = σ(S) A_i ℓ_i + λ ‖v - v_reference‖² / D

so a = 2 σ(S) A and b = 2λ: a group that is already won hardly pulls.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from rpo.config.ranges import Positive
from rpo.config.settings import settings
from rpo.objectives.endpoint.update import Copy, Moments, Ranked, ReferenceWeight, Terms, Times, group_means
from rpo.types import PerSample


@settings
class Dgpo:
    """DGPO: four times of the noisier part of the rollout, shared by the images of a prompt."""

    kind: Literal["dgpo"] = "dgpo"

    beta: Positive = 100.0
    """How soon a group counts as won: 10 to 100 against a frozen reference."""

    reference_weight: ReferenceWeight = 1e-3
    """Weight of the distance from the reference."""

    title: ClassVar[str] = "DGPO"
    ranked: ClassVar[Ranked] = Ranked("group")
    times: ClassVar[Times] = Times(4, (0.0, 0.7), of_rollout=True, shared=True)
    draws_with_old: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[Copy]:
        """The reference, and the policy itself for S."""
        return frozenset({"reference", "current"})

    @property
    def lag(self) -> None:
        """There is no old policy."""

    def worth(self, advantage: PerSample, errors: Mapping[str, PerSample], group: Int[Tensor, " batch"]) -> PerSample:
        """σ(S) A."""
        lost = advantage * (errors["current"] - errors["reference"])
        return torch.sigmoid(self.beta * group_means(lost, group)[0]) * advantage

    def terms(self, moments: Moments) -> Terms:
        """As above."""
        return Terms(2 * moments.worth, {"reference": 2 * self.reference_weight} if self.reference_weight else {})
