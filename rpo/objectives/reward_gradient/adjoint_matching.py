"""Adjoint Matching (Domingo-Enrich et al., arXiv:2409.08861), and its deterministic form for ODE samplers.

The optimum of E[r(x_0) - β KL(path)] has the control that the slope of the optimal value asks for. Along a drawn path
that slope is estimated by the lean adjoint, which follows ∇r back through the *reference*:

    λ_N = ∇r(x_0),        λ_k = (∂μ_ref(x_k)/∂x_k)ᵀ λ_{k+1}

and the policy is fitted to it. With d = μ_θ - μ_ref and a step's standard deviation std,

    L_k = ½ ‖d/std - std λ_{k+1}/β‖²,        β ∇L_k = ∇[ β KL_k - ⟨μ_θ, λ_{k+1}⟩ ]

which is how it is written here: DRaFT's pull, with the reference's λ, and a KL, so one `kl_weight` β is 1/λ of the
paper. At eta 1 the start is forgotten and the optimum is the reference tilted by exp(r/β), whatever sampler is used
afterwards.

At eta 0 nothing is forgotten: a path is its start, KL_k is the cost of the same change of score at eta 1, and the slope
is followed back over the last steps alone. For a Gaussian with variance S, on a variance-preserving process, a linear
reward's mean moves by

    (S a/β) ∫ g²/Σ dt,        Σ = α² S + σ²,        over these steps,

while the tilt is S a/β: how many steps there are is how far it goes, and the variance stays.
"""

from typing import ClassVar, Literal

from torch import Tensor

from rpo.config.ranges import Count
from rpo.config.settings import settings
from rpo.objectives.reward_gradient.draft import of_last


@settings
class AdjointMatching:
    """Adjoint Matching: fits the policy to a slope that is followed back through the reference."""

    kind: Literal["adjoint_matching"] = "adjoint_matching"

    last_steps: Count | None = None
    """Over how many steps from the end; nothing means all, which only a rollout of eta 1 may."""

    title: ClassVar[str] = "Adjoint Matching"

    def step_weights(self, num_steps: int) -> Tensor:
        """What each step of a path counts, [steps]."""
        return of_last(self.last_steps or num_steps, num_steps)
