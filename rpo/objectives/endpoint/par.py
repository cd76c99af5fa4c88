"""PAR (Choi et al., arXiv:2602.04663): the gain of an image's log-likelihood is regressed on its advantage.

With E = -‖x̂_0 - x_0‖² / (w D) for the log-likelihood, w the mean |x̂_0 - x_0| without gradient, and Δ = E - E_old

    L = ½ e^{sg Δ} (A - Δ)² + λ ‖v - v_reference‖² / D        so a = 2 c e^Δ (A - Δ) / w, b = 2λ

c = (∂x̂_0/∂v)². The same gradient as that of the authors' PEPG, -e^Δ (A - Δ) E with all but E held: one preset for both.
"""

from dataclasses import field
from typing import ClassVar, Literal

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
    own_advantage,
)


@settings
class Par:
    """PAR, as its authors run it: rewards are centred, not scaled; all times of the rollout but the last."""

    kind: Literal["par"] = "par"

    reference_weight: ReferenceWeight = 1e-4
    """Weight of the distance from the reference."""

    old: LagConfig = field(default_factory=LagConfig)
    """How the policy that draws follows."""

    title: ClassVar[str] = "PAR"
    ranked: ClassVar[Ranked] = Ranked("none", None, 0.1)
    times: ClassVar[Times] = Times(of_rollout=True)
    old_draws_after = 0
    worth = staticmethod(own_advantage)

    @property
    def needs(self) -> frozenset[Copy]:
        """The old policy, and the reference if it counts."""
        return frozenset({"old", *held({"reference": self.reference_weight})})

    @property
    def lag(self) -> LagConfig:
        """That of the policy that draws."""
        return self.old

    def terms(self, moments: Moments) -> Terms:
        """As above."""
        error, far = moments.x0_error(moments.prediction.detach())
        old_error, old_far = moments.x0_error(moments.said["old"])
        gain = old_error / old_far - error / far
        pull = 2 * moments.x0_slope * gain.exp() * (moments.worth - gain) / far
        return Terms(pull, held({"reference": self.reference_weight}))
