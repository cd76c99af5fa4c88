"""Policy losses from log-densities of transitions, and the trust region that keeps an update small.

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
"""

from dataclasses import dataclass
from typing import Literal

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


def trust_region(
    kl: Float[Tensor, " batch"], coefficient: float, *, power: Literal["sqrt", "linear"]
) -> Float[Tensor, " batch"]:
    """Penalty on the distance from the policy that drew the samples, C √KL or C KL (CPPO, arXiv:2305.18901).

    Args:
        kl: KL of the whole path, or of one step; >= 0, with gradient.
        coefficient: C > 0; see `adapt_coefficient`.
        power: "sqrt" is what the bound on the performance difference has. It pulls with constant strength, hence all
            the way back to the old policy where the advantage is weak; "linear" lets every update go some way.
    """
    if power == "sqrt":
        return coefficient * (kl + 1e-8).sqrt()
    return coefficient * kl


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
