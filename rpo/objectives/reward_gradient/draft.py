"""DRaFT (Clark et al., arXiv:2309.17400): the reward differentiated through the last steps of the sampler.

    ∇ E r(x_0)  =  E Σ_k (∂μ_θ(x_k)/∂θ)ᵀ λ_{k+1},        λ_N = ∇r(x_0),    λ_k = (∂μ_θ(x_k)/∂x_k)ᵀ λ_{k+1}

where step k leads to x_{k+1} = μ_θ(x_k) + noise. DRaFT-K stops after K steps, DRaFT-1 needs no λ but the last.

With a KL weight β, what later steps will have to pay for x_k is followed back too: λ_k -= β ∇_{x_k} KL_k. Without one
nothing holds the policy, and it ends in the images that score best, whatever the prompt's others were.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from rpo.config.ranges import Count
from rpo.config.settings import settings
from rpo.errors import InputError


@settings
class Draft:
    """DRaFT-K, through the policy itself."""

    kind: Literal["draft"] = "draft"

    last_steps: Count = 1
    """K: through how many steps from the end. 1 costs least and is steadiest; more reach the layout of an image."""

    title: ClassVar[str] = "DRaFT"

    def step_weights(self, num_steps: int) -> Tensor:
        """What each step of a path counts, [steps]: the last K all, the others nothing."""
        return of_last(self.last_steps, num_steps)


def of_last(count: int, num_steps: int) -> Tensor:
    """1 for each of the last steps of a path and 0 for the others, [steps]."""
    if count > num_steps:
        raise InputError(f"objective.last_steps is {count}, but a path has {num_steps} steps; give at most that")
    return (torch.arange(num_steps) >= num_steps - count).double()
