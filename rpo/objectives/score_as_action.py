"""Score as action (arXiv:2502.01819): the denoiser's score is the action of a control problem in continuous time.

The policy is to maximise J = E[r(x_0) - kl_weight sum_k c_k], where c_k is what step k costs against the reference and
V(t, x) is that expectation from (t, x) on. Its gradient, one term per step from x_t to x_s = mean + std noise:

    pathwise      <d mean, grad V(s, x_s)>                   - kl_weight dKL_k     needs grad V; any kernel, an ODE too
    likelihood    A_k d log p(x_s | x_t)                     - kl_weight dKL_k     with c_k = KL_k, a function of x_t
                  A_k d log p(x_s | x_t)                                           with c_k = log p - log p_reference

Both hold for every grid, not only in the limit of small steps, if V and A are those of the policy on this grid. The
term dKL_k must not be forgotten: the cost of a step depends on the policy itself, not only through where it leads. The
sampled log-ratio needs no such term, since the mean of d log p is 0, but is noisier.

Critics. M_k = V_k - sum_{j < k} c_j is a martingale. A loss that says so without gradient through its target is right
(`monte_carlo`, `temporal_difference`, `martingale`). Minimising the squared increments of M with gradients through both
ends is not offered: for small steps these are the quadratic variation of M, which the flattest V minimises rather than
the right one.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from rpo.objectives.advantages import traced_returns


def pathwise(
    mean: Float[Tensor, "points c h w"], value_gradient: Float[Tensor, "points c h w"]
) -> Float[Tensor, " points"]:
    """Loss whose gradient moves the mean of a step up the slope of the value where the step led.

    Only its gradient means something, not its value.

    Args:
        mean: Of the transition, with gradient.
        value_gradient: Gradient of V with respect to x_s, at (s, x_s).
    """
    wide = torch.promote_types(mean.dtype, torch.float32)
    return -(mean.to(wide) * value_gradient.detach().to(wide)).sum(dim=(1, 2, 3))


def likelihood(log_prob: Float[Tensor, " points"], advantage: Float[Tensor, " points"]) -> Float[Tensor, " points"]:
    """Loss whose gradient makes steps with a positive advantage likelier.

    Only its gradient means something, not its value.

    Args:
        log_prob: Joint log-density of the step, with gradient.
        advantage: Of the step.
    """
    return -advantage.detach() * log_prob


def endpoint(
    kl_of_posterior: Float[Tensor, " points"],
    advantage: Float[Tensor, " points"],
    *,
    reference_kl: Float[Tensor, " points"] | None = None,
    clip: float = math.inf,
) -> Float[Tensor, " points"]:
    """The likelihood gradient of a step averaged over the paths that end in x_0, a plain advantage before it.

    If the policy is the reversal of the noising process, then given x_0 and x_t its next point is distributed as the
    forward process says, q(x_s | x_t, x_0), and the mean of d log p(x_s | x_t) is -d KL(q ‖ p): the gradient of the
    evidence lower bound on log p(x_0), term by term (arXiv:2006.11239, eq. 5). What is averaged away is the noise of
    the path, which says nothing about x_0. Noising x_0 afresh then stands for the path, at whatever times. For such a
    policy a constant added to all advantages changes nothing on average, and holds it to being one: with a KL weight
    the advantages vanish at the optimum, and without that hold a policy drifts among all that draw the same images.

    An image can be pushed away without bound, and then the policy is the reversal of nothing. With `clip`, a point says
    no more once its KL lies that share of the reference's beyond it, in the direction it asked for.

    Args:
        kl_of_posterior: KL(q(x_s | x_t, x_0) ‖ p(x_s | x_t)), with gradient.
        advantage: Of the point.
        reference_kl: The same KL under the reference; without it nothing is clipped.
        clip: Share of `reference_kl`, > 0.
    """
    advantage = advantage.detach()
    if reference_kl is None:
        return advantage * kl_of_posterior
    nearest, farthest = (1 - clip) * reference_kl, (1 + clip) * reference_kl
    wanted = torch.where(advantage > 0, kl_of_posterior.maximum(nearest), kl_of_posterior.minimum(farthest))
    return advantage * wanted


def log_ratio_cost(
    log_prob: Float[Tensor, "*points"], reference_log_prob: Float[Tensor, "*points"]
) -> Float[Tensor, "*points"]:
    """Cost of a step by the sample that was drawn: its mean is the KL of the step, its gradient is cut.

    Args:
        log_prob: Joint log-density of the step under the policy that drew it.
        reference_log_prob: Under the reference.
    """
    return (log_prob - reference_log_prob).detach()


def monte_carlo(values: Float[Tensor, " points"], returns: Float[Tensor, " points"]) -> Float[Tensor, " points"]:
    """Half the squared distance to how it ended: unbiased, but as noisy as the ends are.

    Args:
        values: V, with gradient.
        returns: Reward minus the costs still to come.
    """
    return 0.5 * (values - returns.detach()) ** 2


def temporal_difference(
    values: Float[Tensor, " points"], next_values: Float[Tensor, " points"], costs: Float[Tensor, " points"]
) -> Float[Tensor, " points"]:
    """Half the squared distance to the value one step on, minus its cost; no gradient through that target.

    Less noisy than `monte_carlo`, but what it learns at the data end takes as many sweeps to reach the noise end as
    there are steps.

    Args:
        values: V at the node, with gradient.
        next_values: V at the next node; the reward at the data end.
        costs: Of the step between, already times `kl_weight`.
    """
    return 0.5 * (values - (next_values - costs).detach()) ** 2


def martingale(
    values: Float[Tensor, "nodes batch"], costs: Float[Tensor, "steps batch"], *, trace: float
) -> Float[Tensor, "steps batch"]:
    """Loss whose gradient is the martingale orthogonality condition with eligibility traces (arXiv:2108.06655).

    sum_k (M_{k+1} - M_k) sum_{j <= k} trace^{k-j} dV_j = 0, which is sum_j dV_j A_j with A of `gae`: half the squared
    distance to the traced return.

    Args:
        values: V at every node from noise to data, with gradient; the last one is the reward.
        costs: Of every step, already times `kl_weight`.
        trace: 0 … 1; 0 is `temporal_difference`, 1 is `monte_carlo`.
    """
    return 0.5 * (values[:-1] - traced_returns(values.detach(), costs.detach(), trace=trace)) ** 2


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
