"""AlignProp (Prabhudesai et al., arXiv:2310.03739): DRaFT through a random number of steps.

Its authors draw for each batch the step from which on the network's outputs have a gradient; the state flows further
back, but meets no output there. So λ of a step does not depend on what was drawn, only whether the step counts:

    E gradient  =  E Σ_k p_k (∂μ_θ(x_k)/∂θ)ᵀ λ_{k+1},        p_k = P(the gradient reaches step k),

and that sum is what is descended here: the same gradient in expectation, without the noise of the draw.
"""

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rpo.config.settings import settings

MEAN, SPREAD = 0.84, 0.1
"""Of the normal truncation, as shares of the path: N(42, 5) of 50 steps."""

LEAST_WEIGHT = 1e-3
"""Steps that count less are left out."""


@settings
class AlignProp:
    """AlignProp, through the policy itself."""

    kind: Literal["alignprop"] = "alignprop"

    truncation: Literal["uniform", "normal"] = "uniform"
    """Where the gradient ends: anywhere alike, or at about 84 % of the path."""

    title: ClassVar[str] = "AlignProp"

    def step_weights(self, num_steps: int) -> Tensor:
        """What each step of a path counts, [steps]: p_k."""
        step = torch.arange(num_steps, dtype=torch.float64)
        if self.truncation == "uniform":
            return (step + 1) / (num_steps + 1)
        weights = (1 + torch.erf((step / num_steps - MEAN) / (SPREAD * math.sqrt(2)))) / 2
        return torch.where(weights < LEAST_WEIGHT, 0.0, weights)
