"""Direct Group Preference Optimization (DGPO, Luo et al., arXiv:2510.08425): DPO's weight for a whole group of images.

With ℓ = ‖v - v*‖² / D at the same time and noise for all K images of a group,

    S = β/K Σ_i A_i (sg ℓ_i - ℓ_reference,i),        L = σ(S) A_i ℓ_i + λ ‖v - v_reference‖² / D

so a = 2 σ(S) A and b = 2λ: a group that is already won hardly pulls.

The authors' further parts are options. A fast moving average of the policy is its old self: with a clip an image pulls
no more once its likelihood has moved away from that by exp(ℓ_old - ℓ) > 1 + clip where A > 0, or < 1 - clip where
A < 0, a mask and no min; and after some updates the average may draw the images. Their kl_cfg of 4.5, by which the
reference is guided where the policy is not, is the setting `reference_guidance`.
"""

from collections.abc import Mapping
from dataclasses import field
from typing import ClassVar, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from rpo.config.ranges import Positive, WholeNumber
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
    group_means,
    held,
)
from rpo.types import PerSample

AVERAGE = LagConfig(decay=0.3, rise=1e-3)
"""How fast the authors' moving average is."""


@settings
class Dgpo:
    """DGPO: four times of the noisier part of the rollout, shared by the images of a prompt."""

    kind: Literal["dgpo"] = "dgpo"

    beta: Positive = 100.0
    """How soon a group counts as won: 10 to 100 against a frozen reference."""

    reference_weight: ReferenceWeight = 1e-3
    """Weight of the distance from the reference."""

    clip: Positive | None = None
    """How far the ratio of likelihoods to the old policy may go from 1; nothing for no limit. 1e-3 to 5e-2."""

    old_draws_after: WholeNumber | None = None
    """Updates after which the old policy draws the images; nothing: the policy itself does. 200 to 500."""

    old: LagConfig = field(default_factory=lambda: AVERAGE)
    """How the old policy follows, where one of these two asks for it."""

    title: ClassVar[str] = "DGPO"
    ranked: ClassVar[Ranked] = Ranked("group")
    times: ClassVar[Times] = Times(4, (0.0, 0.7), of_rollout=True, shared=True)

    def __post_init__(self) -> None:
        """Refuse to say how something follows that is not there."""
        if self.lag is None and self.old != AVERAGE:
            raise InputError(
                "objective.old says how the old policy follows, but neither objective.clip nor "
                "objective.old_draws_after asks it; give one of these, or leave it out"
            )

    @property
    def needs(self) -> frozenset[Copy]:
        """The reference, and the policy itself for S; with a clip its old self."""
        return frozenset({"reference", "current", *(("old",) if self.clip else ())})

    @property
    def lag(self) -> LagConfig | None:
        """That of the old policy, if it is asked for."""
        return None if self.clip is None and self.old_draws_after is None else self.old

    def worth(self, advantage: PerSample, errors: Mapping[str, PerSample], group: Int[Tensor, " batch"]) -> PerSample:
        """σ(S) A."""
        lost = advantage * (errors["current"] - errors["reference"])
        return torch.sigmoid(self.beta * group_means(lost, group)[0]) * advantage

    def terms(self, moments: Moments) -> Terms:
        """As above."""
        pull, holds = 2 * moments.worth, held({"reference": self.reference_weight})
        if self.clip is None:
            return Terms(pull, holds)
        ratio = (moments.error(moments.said["old"]) - moments.error(moments.prediction.detach())).exp()
        is_clipped = clipped_by(ratio, moments.worth, self.clip)
        return Terms(torch.where(is_clipped, 0.0, pull), holds, is_clipped=is_clipped)
