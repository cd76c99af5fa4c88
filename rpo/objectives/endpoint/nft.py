"""DiffusionNFT (Zheng et al., arXiv:2509.16117): away from the network that drew, towards good images and off bad ones.

With q in [0, 1] the worth of an image, and two networks that the policy implies,

    v⁺ = (1 - β) v_old + β v,        v⁻ = (1 + β) v_old - β v,
    L  = M/β · [ q ‖x̂_0⁺ - x_0‖² / w⁺ + (1 - q) ‖x̂_0⁻ - x_0‖² / w⁻ ] / D + λ ‖v - v_reference‖² / D

where w is the mean distance |x̂_0 - x_0| of each branch, without gradient. So a = 2Mc (q/w⁺ - (1-q)/w⁻) from v_old, and
b = 2Mcβ (q/w⁺ + (1-q)/w⁻) holds to v_old, c = (∂x̂_0/∂v)². At v = v_old the loss does not depend on the reward, its
gradient does.
"""

from collections.abc import Mapping
from dataclasses import field
from typing import ClassVar, Literal

from jaxtyping import Int
from torch import Tensor

from rpo.config.ranges import Positive
from rpo.config.settings import settings
from rpo.objectives.endpoint.update import (
    Copy,
    LagConfig,
    Moments,
    Ranked,
    ReferenceWeight,
    Terms,
    Times,
    held,
)
from rpo.types import PerSample

MOST = 5.0
"""M: an advantage of that many standard deviations is all good."""


@settings
class Nft:
    """DiffusionNFT, as its authors run it: images by the old policy, all times of the rollout but the last."""

    kind: Literal["nft"] = "nft"

    beta: Positive = 1.0
    """How far the implied networks lie from the old one. 1; 0.1 where rewards are of several kinds."""

    reference_weight: ReferenceWeight = 1e-4
    """Weight of the distance from the reference."""

    old: LagConfig = field(default_factory=LagConfig)
    """How the policy that draws follows."""

    title: ClassVar[str] = "DiffusionNFT"
    ranked: ClassVar[Ranked] = Ranked("batch", MOST, 1 / MOST)
    times: ClassVar[Times] = Times(of_rollout=True)
    old_draws_after = 0

    @property
    def needs(self) -> frozenset[Copy]:
        """The old policy and the reference."""
        return frozenset({"old", *held({"reference": self.reference_weight})})

    @property
    def lag(self) -> LagConfig:
        """That of the policy that draws."""
        return self.old

    def worth(self, advantage: PerSample, errors: Mapping[str, PerSample], group: Int[Tensor, " batch"]) -> PerSample:
        """Q."""
        return (advantage / 2 + 0.5).clamp(0, 1)

    def terms(self, moments: Moments) -> Terms:
        """As above."""
        now, old, q = moments.prediction.detach(), moments.said["old"], moments.worth
        _, far = moments.x0_error(old + self.beta * (now - old))
        _, far_of_bad = moments.x0_error(old - self.beta * (now - old))
        good, bad = q / far, (1 - q) / far_of_bad
        scale = 2 * MOST * moments.x0_slope
        to_old = scale * self.beta * (good + bad)
        holds: dict[Copy, PerSample | float] = {"old": to_old, **held({"reference": self.reference_weight})}
        return Terms(scale * (good - bad), holds, from_old=True)
