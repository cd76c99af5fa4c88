"""Advantages: how much better an image, or one step towards it, turned out than was to be expected.

Against the other images of its group (GRPO, arXiv:2402.03300), with one number for all steps of an image:

    A = (r - mean_group r) / (std + eps)

Against a value, with one number per step. With V_k the value of node k, V_K = r at the data end, and c_k >= 0 what step
k costs (its KL, times `kl_weight`), nothing is discounted and

    delta_k = V_{k+1} - V_k - c_k                          `value_difference`: its noise vanishes with the step
    A_k     = r - sum_{j >= k} c_j - V_k                   `return_minus_value`: right whatever the value, but noisier
    A_k     = sum_{j >= k} trace^{j-k} delta_j             `gae` (arXiv:1506.02438, eq. 16): between these two

`trace` counts per step: to compare grids of N and 2N steps, take its square root on the finer one.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rpo.errors import InputError

MAX_ADVANTAGE = 5.0
"""Where trainers cut a normalised advantage: beyond it a single lucky image would make the update."""

Scale = Literal["group", "batch", "none"]
"""What a centred reward is divided by: the spread of its group, of the whole batch, or nothing."""


def group_normalize(
    rewards: Float[Tensor, " batch"], group: Int[Tensor, " batch"], *, scale: Scale, eps: float = 1e-4
) -> Float[Tensor, " batch"]:
    """Rewards relative to the mean of their group: they sum to 0 in each, and equal rewards give exactly 0.

    Args:
        rewards: One per image; NaN where an image could not be judged, which is in no mean and no spread, and gets 0.
        group: Label of each image's group, usually the index of its prompt; any integers, in any order.
        scale: "group" divides by the group's standard deviation, which counts every prompt alike and blows up small
            differences; "batch" by that of all rewards (Flow-GRPO), "none" keeps the reward's own unit.
        eps: Added to the standard deviation; a spread well below it counts as none.

    Raises:
        ValueError: If an image is alone in its group: its advantage would always be 0.

    Example:
        >>> group_normalize(torch.tensor([1.0, 3.0, 5.0, 5.0]), torch.tensor([0, 0, 1, 1]), scale="none")
        tensor([-1.,  1.,  0.,  0.])
    """
    same, is_judged = group[:, None] == group, ~rewards.isnan()
    if alone := int((same.sum(dim=1) == 1).sum()):
        raise InputError(
            f"{alone} of {len(group)} images are alone in their group, but an advantage compares the images of a "
            "group; draw at least 2 images per prompt, or give all images one group"
        )
    same = same & is_judged
    sizes = same.sum(dim=1).clamp(min=1)
    # From the group's lowest reward, so that equal rewards are exactly 0 and a large offset costs no digits.
    wide = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    above = wide - torch.where(same, wide, torch.inf).amin(dim=1)
    centred = torch.where(is_judged, above - torch.where(same, above, 0).sum(dim=1) / sizes, 0)
    if scale == "none" or not is_judged.any():
        return centred
    if scale == "group":
        std = (torch.where(same, centred**2, 0).sum(dim=1) / sizes).sqrt()
    else:
        known = wide[is_judged]
        std = (known - known.min()).std(correction=0)
    return centred / (std + eps)


def shares(parts: Float[Tensor, "parts batch"]) -> Float[Tensor, " parts"]:
    """What part each of several summands has in an advantage A = sum_i A_i:  mean(A_i A) / mean(A^2).

    They sum to 1; one below 0 pulls against the others. Where the advantage is 0 for all images, no one has a part.

    Example:
        >>> shares(torch.tensor([[3.0, -3.0], [1.0, -1.0]]))
        tensor([0.7500, 0.2500])
    """
    total = parts.sum(dim=0)
    power = total.square().mean()
    return (parts * total).mean(dim=1) / torch.where(power > 0, power, 1)


def value_difference(
    values: Float[Tensor, "nodes batch"], costs: Float[Tensor, "steps batch"]
) -> Float[Tensor, "steps batch"]:
    """Advantage of each step by what it added to the value, V_{k+1} - V_k - c_k.

    Args:
        values: V at every node from noise to data; the last one is the reward.
        costs: Of every step, already times `kl_weight`.
    """
    _check_steps(values, costs)
    return values[1:] - costs - values[:-1]


def return_minus_value(
    values: Float[Tensor, "nodes batch"], costs: Float[Tensor, "steps batch"]
) -> Float[Tensor, "steps batch"]:
    """Advantage of each step by how it all ended, r - sum_{j >= k} c_j - V_k.

    Args:
        values: V at every node from noise to data; the last one is the reward.
        costs: Of every step, already times `kl_weight`.
    """
    _check_steps(values, costs)
    costs_to_come = costs.flip(0).cumsum(0).flip(0)
    return values[-1] - costs_to_come - values[:-1]


def gae(
    values: Float[Tensor, "nodes batch"], costs: Float[Tensor, "steps batch"], *, trace: float
) -> Float[Tensor, "steps batch"]:
    """Advantage between the two above: `trace` 0 is `value_difference`, 1 is `return_minus_value`.

    Args:
        values: V at every node from noise to data; the last one is the reward.
        costs: Of every step, already times `kl_weight`.
        trace: 0 … 1; the less the value can be trusted, the larger. 0.9 … 0.95 is usual.
    """
    return traced_returns(values, costs, trace=trace) - values[:-1]


def traced_returns(
    values: Float[Tensor, "nodes batch"], costs: Float[Tensor, "steps batch"], *, trace: float
) -> Float[Tensor, "steps batch"]:
    """What a value is to be compared with: G_k = trace G_{k+1} + (1 - trace) V_{k+1} - c_k, from G_K = r.

    Args:
        values: V at every node from noise to data; the last one is the reward.
        costs: Of every step, already times `kl_weight`.
        trace: 0 asks only the value of the next node, 1 only the reward.

    Raises:
        ValueError: If `trace` is not in [0, 1].
    """
    _check_steps(values, costs)
    if not 0 <= trace <= 1:
        raise InputError(f"trace is {trace}, but it must be in [0, 1]; 0.95 is usual, 1 trusts the reward alone")
    returns: list[Tensor] = []
    following = values[-1]
    for value, cost in zip(values[1:].flip(0), costs.flip(0), strict=True):
        following = trace * following + (1 - trace) * value - cost
        returns.append(following)
    return torch.stack(returns[::-1])


def normalize_per_step(advantages: Float[Tensor, "steps batch"], *, eps: float = 1e-8) -> Float[Tensor, "steps batch"]:
    """Advantages centred and scaled over the batch, each step by itself, as score-as-action's authors run it.

    Not the gradient of the objective any more: dividing step k by its own std_k weighs the times by 1 / std_k, which
    favours those where the policy makes no difference, and the weights change with the grid. A larger step size that
    happens to be stable is what it gains. Trainers leave it off.

    Args:
        advantages: Of every step and image.
        eps: Added to the standard deviation.
    """
    from_first = advantages - advantages[:, :1]  # equal advantages are then exactly 0
    centred = from_first - from_first.mean(dim=1, keepdim=True)
    return centred / (centred.std(dim=1, correction=0, keepdim=True) + eps)


def _check_steps(values: Tensor, costs: Tensor) -> None:
    if values.shape[0] != costs.shape[0] + 1:
        raise InputError(
            f"{values.shape[0]} values come with {costs.shape[0]} costs, but n + 1 nodes have n steps; give the value "
            "of all nodes, the last being the reward, and the cost of all steps"
        )
