"""Whether one order predicts another: Spearman's rank correlation with a bootstrap interval.

    rho = correlation of the ranks of x and of y,       equal values sharing their mean rank

Where all values of a side are equal there is no order to predict, which counts as 0.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from rpo.errors import InputError
from rpo.evaluation.intervals import Interval

RESAMPLES = 2_000
TAIL = 0.025


def rank_correlation(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rho of two lists.

    Example:
        >>> rank_correlation([1.0, 2.0, 3.0], [10.0, 30.0, 20.0])
        0.5
    """
    ranks = np.stack([rankdata(x), rankdata(y)])
    ranks -= ranks.mean(axis=1, keepdims=True)
    spread = np.sqrt((ranks**2).sum(axis=1).prod())
    return float(ranks[0] @ ranks[1] / spread) if spread > 0 else 0.0


def rank_agreement(
    before: NDArray[np.float64], after: NDArray[np.float64], *, seed: int, resamples: int = RESAMPLES
) -> Interval:
    """How well the order of things by the means of `before` predicts that by the means of `after`.

    The interval is of 95 %, by resampling prompts, the same ones on both sides, and seeds. It says nothing of other
    things than these.

    Args:
        before: [things, prompts].
        after: Of the same things and prompts, [things, seeds, prompts].
    """
    if before.ndim != 2 or after.shape != (len(before), after.shape[1], before.shape[1]):  # noqa: PLR2004
        raise InputError(
            f"before has shape {before.shape} and after {after.shape}; expected [things, prompts] and [things, seeds, "
            "prompts] of the same things and prompts; judge both on one list"
        )
    rng = np.random.default_rng(seed)
    _, seeds, prompts = after.shape
    drawn = list[float]()
    for _ in range(resamples):
        own, runs = rng.integers(prompts, size=prompts), rng.integers(seeds, size=seeds)
        drawn.append(rank_correlation(before[:, own].mean(1), after[:, runs].mean(1)[:, own].mean(1)))
    low, high = np.quantile(drawn, [TAIL, 1 - TAIL])
    return Interval(rank_correlation(before.mean(1), after.mean((1, 2))), float(low), float(high))
