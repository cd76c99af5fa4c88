"""Has a number left its own past? The same prompts and noise, before and now, prompt by prompt.

    d_i = now_i - before_i,      z = Σ sign(d_i) r_i / sqrt(Σ r_i²),      r_i the rank of |d_i|,

which is Wilcoxon's signed-rank statistic, standard normal where nothing moved. It says whether a number moved at all,
and better than a mean does: a policy that rots fails first on some prompts by much and on the others by a little, and
these few are the noise of the mean. Whether a move matters is told by its size.
"""

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

FEWEST = 5
"""Prompts from which a move can be told from noise."""


@dataclass(frozen=True)
class Move:
    """From where to where a number went, how surely and how far."""

    before: float
    now: float
    z: float
    """How surely, as a standard normal number; upwards above 0."""
    spreads: float
    """How far, in standard deviations between prompts before; upwards above 0."""


def moved(before: Float[Tensor, " prompts"], now: Float[Tensor, " prompts"]) -> Move | None:
    """How far a number moved, over the prompts that have one both times; nothing if these are too few.

    Args:
        before: One number per prompt; NaN is none.
        now: Of the same prompts.

    Example:
        >>> import torch
        >>> before = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
        >>> move = moved(before, before - torch.tensor([1.0, 1.1, 0.9, 1.2, 0.8]))
        >>> move and (round(move.z, 2), round(move.spreads, 2))
        (-2.02, -0.63)
    """
    known = ~(before.isnan() | now.isnan())
    if int(known.sum()) < FEWEST:
        return None
    first, last = before[known].double(), now[known].double()
    mean, spread = (last - first).mean().item(), first.std().item()
    far = mean / spread if spread > 0 else math.copysign(math.inf, mean) if mean else 0.0
    return Move(first.mean().item(), last.mean().item(), _signed_rank(last - first), far)


def _signed_rank(change: Float[Tensor, " prompts"]) -> float:
    """Wilcoxon's z; equal changes share their mean rank, and none is left out."""
    size = change[change != 0].abs()
    if not len(size):
        return 0.0
    ranks = (size[:, None] > size).sum(dim=1) + ((size[:, None] == size).sum(dim=1) + 1) / 2
    return ((change[change != 0].sign() * ranks).sum() / ranks.square().sum().sqrt()).item()
