"""Policy losses of single steps, by likelihood and along the slope of a value, and the trust region.

With A the advantage of a step, log p its joint log-density (summed over the D dimensions of a latent) and "old" the
policy that drew it:

    plain      -A (log p - log p_old)
    clipped    max(-A c, -A clip(c, ±clip)) D,    c = ratio - 1,    ratio = exp((log p - log p_old) / D)

The second is PPO's (arXiv:1707.06347, eq. 7) with the ratio *per dimension*, as every diffusion trainer takes it: the
joint ratio of 16,384 dimensions is 0 or infinite after one update. Its clip range is small for that reason: 1e-4 per
dimension is 1.6 nats of the whole latent of SD 1.5. Two things differ from those trainers. The loss is times D, so that
at ratio 1 both losses have one gradient, -A grad log p, and a `kl_weight` means the same beside either; without, it
would mean D times as much beside the second. And both are 0 where the policy is still the one that drew the samples,
which changes no gradient and keeps the digits of a ratio near 1.

Steps are summed, never averaged: a mean over them would make the gradient shrink as the grid gets finer.

Score as action (arXiv:2502.01819) maximises J = E[r(x_0) - kl_weight sum_k c_k], where c_k is what step k costs against
the reference and V(t, x) is that expectation from (t, x) on. Its gradient, one term per step from x_t to
x_s = mean + std noise:

    pathwise      <d mean, grad V(s, x_s)>                   - kl_weight dKL_k     needs grad V; any kernel, an ODE too
    likelihood    A_k d log p(x_s | x_t)                     - kl_weight dKL_k     with c_k = KL_k, a function of x_t
                  A_k d log p(x_s | x_t)                                           with c_k = log p - log p_reference

Both hold for every grid, not only in the limit of small steps, if V and A are those of the policy on this grid. The
term dKL_k must not be forgotten: the cost of a step depends on the policy itself, not only through where it leads. The
sampled log-ratio needs no such term, since the mean of d log p is 0, but is noisier.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rpo.errors import InputError


@dataclass(frozen=True)
class Surrogate:
    """The loss of every (image, step), with what shows how far the policy has moved.

    `ratio` is per dimension and detached; `is_clipped` marks the points that the clip leaves without gradient.
    """

    loss: Float[Tensor, " points"]
    ratio: Float[Tensor, " points"]
    is_clipped: Bool[Tensor, " points"]


def plain(
    log_prob: Float[Tensor, " points"],
    old_log_prob: Float[Tensor, " points"],
    advantage: Float[Tensor, " points"],
    *,
    num_dims: int,
) -> Surrogate:
    """The score-function gradient (REINFORCE), for one update per rollout: samples of an older policy bias it.

    Args:
        log_prob: Joint log-density under the policy, with gradient.
        old_log_prob: Under the policy that drew the samples.
        advantage: Of each point.
        num_dims: Dimensions of one latent, for the reported ratio alone.
    """
    change = log_prob - old_log_prob.detach()
    loss = -advantage.detach() * change
    ratio = (change.detach() / num_dims).exp()
    return Surrogate(loss, ratio, torch.zeros_like(ratio, dtype=torch.bool))


def clipped_surrogate(
    log_prob: Float[Tensor, " points"],
    old_log_prob: Float[Tensor, " points"],
    advantage: Float[Tensor, " points"],
    *,
    num_dims: int,
    clip: float,
) -> Surrogate:
    """PPO's loss: no gain from a ratio that has left 1 ± clip in the direction of its advantage.

    Args:
        log_prob: Joint log-density under the policy, with gradient.
        old_log_prob: Under the policy that drew the samples.
        advantage: Of each point.
        num_dims: Dimensions of one latent, c·h·w.
        clip: Half-width of the range of the ratio per dimension, > 0; 1e-5 … 1e-3. `clip * num_dims` is the range in
            nats of a whole latent, to keep when the resolution changes.

    Raises:
        ValueError: If `clip` is not positive.

    Example:
        >>> up, down = torch.tensor([5.0]), torch.tensor([-1.0])
        >>> clipped_surrogate(up, torch.zeros(1), down, num_dims=256, clip=1e-3).is_clipped  # a mistake: full gradient
        tensor([False])
    """
    if clip <= 0:
        raise InputError(f"clip is {clip}, but it must be > 0; 1e-4 is usual, `plain` has no clip")
    advantage = advantage.detach()
    change = torch.expm1((log_prob - old_log_prob.detach()) / num_dims)
    kept = change.clamp(-clip, clip)
    loss = num_dims * torch.maximum(-advantage * change, -advantage * kept)  # eq. 7
    is_clipped = (change.abs() > clip) & (advantage * change > 0)
    return Surrogate(loss, 1 + change.detach(), is_clipped)


def trust_region(kl: Float[Tensor, " batch"], coefficient: float) -> Float[Tensor, " batch"]:
    """Penalty on the distance from the policy that drew the samples, C √KL (CPPO, arXiv:2305.18901).

    It pulls with constant strength, hence all the way back to the old policy where the advantage is weak; C KL would
    let every update go some way, but the bound on the performance difference has the root.

    Args:
        kl: KL of the whole path, or of one step; >= 0, with gradient.
        coefficient: C > 0; see `adapt_coefficient`.
    """
    return coefficient * (kl + 1e-8).sqrt()


def adapt_coefficient(
    coefficient: float,
    sqrt_kl: float,
    *,
    target: float,
    tolerance: float = 0.1,
    factor: float = 1.5,
    low: float = 1e-8,
    high: float = 10.0,
) -> float:
    """The coefficient for the next update: larger after too long a step, smaller after too short a one.

    Args:
        coefficient: Of the last update.
        sqrt_kl: √KL between the policies before and after it.
        target: √KL wanted, > 0; 0.02 in the control experiments.
        tolerance: Relative deviation that is left alone.
        factor: What the coefficient is multiplied or divided by, > 1.
        low: Least coefficient.
        high: Largest coefficient.

    Raises:
        ValueError: If `sqrt_kl` is not a number, which no coefficient would mend.

    Example:
        >>> adapt_coefficient(1.0, 0.05, target=0.02)
        1.5
    """
    if not sqrt_kl >= 0:
        raise InputError(f"sqrt_kl is {sqrt_kl}, but a distance is >= 0; look for a policy that has diverged")
    if sqrt_kl > (1 + tolerance) * target:
        coefficient = coefficient * factor
    elif sqrt_kl < (1 - tolerance) * target:
        coefficient = coefficient / factor
    return min(max(coefficient, low), high)


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


def log_ratio_cost(
    log_prob: Float[Tensor, "*points"], reference_log_prob: Float[Tensor, "*points"]
) -> Float[Tensor, "*points"]:
    """Cost of a step by the sample that was drawn: its mean is the KL of the step, its gradient is cut.

    Args:
        log_prob: Joint log-density of the step under the policy that drew it.
        reference_log_prob: Under the reference.
    """
    return (log_prob - reference_log_prob).detach()
