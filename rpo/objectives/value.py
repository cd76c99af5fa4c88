"""Losses of a value V(t, x), the return that is still to be expected.

M_k = V_k - sum_{j < k} c_j is a martingale. A loss that says so without gradient through its target is right.
Minimising the squared increments of M with gradients through both ends is not offered: for small steps these are the
quadratic variation of M, which the flattest V minimises rather than the right one. With the traced return of
`rpo.objectives.advantages.traced_returns` as target, `monte_carlo` is TD(0) at trace 0, the martingale orthogonality
condition with eligibility traces (arXiv:2108.06655) between, and what its name says at trace 1.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def monte_carlo(values: Float[Tensor, " points"], returns: Float[Tensor, " points"]) -> Float[Tensor, " points"]:
    """Half the squared distance to how it ended: unbiased, but as noisy as the ends are.

    Args:
        values: V, with gradient.
        returns: Reward minus the costs still to come.
    """
    return 0.5 * (values - returns.detach()) ** 2


def explained_variance(values: Float[Tensor, " points"], returns: Float[Tensor, " points"]) -> Float[Tensor, ""]:
    """Share of the variance of the returns that the values account for: 1 perfect, 0 no better than a constant.

    Negative where they are worse than a constant; NaN where all returns are equal, since there is nothing to explain.

    Args:
        values: V of each point.
        returns: What came of it.
    """
    values, returns = values.detach(), returns.detach()
    spread = (returns - returns[0]).var(correction=0)  # exactly 0 if all are equal
    return 1 - (returns - values).var(correction=0) / torch.where(spread > 0, spread, torch.nan)
