"""Has a number left its own past? The same prompts and noise, before and now, prompt by prompt.

    d_i = now_i - before_i,      t = mean(d) / (sd(d) / sqrt(n)),      move = mean(d) / sd(before)

t says whether it moved at all: of n prompts its tails are Student's, so it is told as the standard normal number that
is as unlikely (by Wallace, 1959, within 2 %). `move` says whether that matters: in spreads between prompts.
"""

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

FEWEST = 5
"""Prompts from which a move can be told from noise."""


@dataclass(frozen=True)
class Move:
    """From where to where a number went, in two units."""

    before: float
    now: float
    errors: float
    """In standard errors, as a standard normal number; upwards above 0."""
    spreads: float
    """In standard deviations between prompts before; upwards above 0."""


def moved(before: Float[Tensor, " prompts"], now: Float[Tensor, " prompts"]) -> Move | None:
    """How far a number moved, over the prompts that have one both times; nothing if these are too few.

    Args:
        before: One number per prompt; NaN is none.
        now: Of the same prompts.

    Example:
        >>> before = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
        >>> move = moved(before, before - torch.tensor([1.0, 1.1, 0.9, 1.0, 1.0]))
        >>> move and (round(move.errors, 1), round(move.spreads, 2))
        (-4.4, -0.63)
    """
    known = ~(before.isnan() | now.isnan())
    if int(known.sum()) < FEWEST:
        return None
    first, last = before[known].double(), now[known].double()
    change, count = last - first, int(known.sum())
    error, spread = change.std().item() / math.sqrt(count), first.std().item()
    mean = change.mean().item()
    return Move(
        first.mean().item(),
        last.mean().item(),
        _normal(_ratio(mean, error), freedom=count - 1),
        _ratio(mean, spread),
    )


def _normal(t: float, *, freedom: int) -> float:
    """The standard normal number that is as unlikely as Student's t."""
    if math.isinf(t):
        return t
    size = (8 * freedom + 1) / (8 * freedom + 3) * math.sqrt(freedom * math.log1p(t * t / freedom))
    return math.copysign(size, t)


def _ratio(change: float, unit: float) -> float:
    return change / unit if unit > 0 else math.copysign(math.inf, change) if change else 0.0
