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
DIGITS = 12
"""Means that differ by rounding alone are equal."""


def rank_correlation(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rho of two lists.

    Example:
        >>> round(rank_correlation([1.0, 2.0, 3.0], [10.0, 30.0, 20.0]), 9)
        0.5
    """
    return float(_correlations(np.asarray(x)[:, None], np.asarray(y)[:, None])[0])


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
    # How often each is drawn; a mean over what is drawn is a sum over all with these weights.
    of_prompts, of_seeds = (rng.multinomial(count, [1 / count] * count, size=resamples) for count in (prompts, seeds))
    first = before @ of_prompts.T / prompts
    then = (after @ of_prompts.T * of_seeds.T).sum(axis=1) / (seeds * prompts)
    low, high = np.quantile(_correlations(first, then), [TAIL, 1 - TAIL])
    return Interval(rank_correlation(before.mean(1), after.mean((1, 2))), float(low), float(high))


def _correlations(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each column of two arrays [things, columns]."""
    ranks = np.stack([rankdata(np.round(side, DIGITS), axis=0) for side in (x, y)])
    ranks -= ranks.mean(axis=1, keepdims=True)
    spread = np.sqrt((ranks**2).sum(axis=1).prod(axis=0))
    return np.divide((ranks[0] * ranks[1]).sum(axis=0), spread, out=np.zeros_like(spread), where=spread > 0)
