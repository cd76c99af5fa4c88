"""REBEL (arXiv:2404.16767) at the endpoint: differences of rewards are regressed on differences of log-likelihood.

With E = -‖v - v*‖² / D for the log-likelihood at a time and noise that the images of a group share, and Δ = E - E_old,

    L = mean over pairs i ≠ j of  ½ [ η (Δ_i - Δ_j) - (A_i - A_j) ]²

so that in a mean over the images, K to a group, a_i = 4η K/(K-1) [ (A_i - Ā) - η (Δ_i - Δ̄) ]. PAR without its ratio,
differenced over pairs, is the same. On whole paths, with Δ the sum of their steps' log-ratios, it is GRPO with
`regression`.
"""

from collections.abc import Mapping
from dataclasses import field
from typing import ClassVar, Literal

from jaxtyping import Int
from torch import Tensor

from rpo.config.ranges import Positive
from rpo.config.settings import settings
from rpo.objectives.endpoint.update import Copy, LagConfig, Moments, Ranked, Terms, Times, group_means
from rpo.types import PerSample


@settings
class Rebel:
    """REBEL for whole images: all times of the rollout but the last, shared by the images of a prompt."""

    kind: Literal["rebel"] = "rebel"

    eta: Positive = 1.0
    """What a nat of likelihood is worth: larger stays closer to the old policy."""

    old: LagConfig = field(default_factory=LagConfig)
    """How the policy that draws follows."""

    title: ClassVar[str] = "REBEL"
    ranked: ClassVar[Ranked] = Ranked("group")
    times: ClassVar[Times] = Times(of_rollout=True, shared=True)
    old_draws_after = 0

    @property
    def needs(self) -> frozenset[Copy]:
        """The old policy, and the policy itself."""
        return frozenset({"old", "current"})

    @property
    def lag(self) -> LagConfig:
        """That of the policy that draws."""
        return self.old

    def worth(self, advantage: PerSample, errors: Mapping[str, PerSample], group: Int[Tensor, " batch"]) -> PerSample:
        """What is left to gain by the image, against its group."""
        return left_to_gain(advantage, errors["old"] - errors["current"], group, eta=self.eta)

    def terms(self, moments: Moments) -> Terms:
        """As above."""
        return Terms(4 * self.eta * moments.worth)


def left_to_gain(advantage: PerSample, change: PerSample, group: Int[Tensor, " batch"], *, eta: float) -> PerSample:
    """K/(K-1) [ (A - Ā) - η (Δ - Δ̄) ] of each: a nat of Δ changes L, a mean over images, by -2η times that.

    Args:
        change: Δ, how much likelier each has become than under the old policy, in nats.
        group: Equal for what is compared.
    """
    left = advantage - eta * change
    means, sizes = group_means(left, group)
    return (left - means) * (sizes / (sizes - 1).clamp(min=1))  # what is alone differs by 0 from itself
