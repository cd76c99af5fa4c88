"""A share or a mean difference of images, with the 95 % interval that it deserves.

A share has Wilson's score interval (E. B. Wilson, JASA 1927): it stays inside [0, 1] and is right for shares near 0 and
1, where the textbook interval has no width. A difference has a bootstrap interval.

The images of one prompt resemble each other, so both count prompts: the share through Kish's design effect (as Korn and
Graubard, Survey Methodology 1998), the difference by resampling prompts. Both are widened by Student's t where prompts
are few, the bootstrap as "expanded percentile interval" (Hesterberg, arXiv:1411.5279); below `FEW_PROMPTS` there is
nothing to resample from, and the interval is that of Student's t itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, stdtrit

from rpo.errors import InputError

FEW_PROMPTS = 6
"""From here on, the range of the resampled prompts is wide enough to be a 95 % interval."""

RESAMPLES = 10_000
_UPPER = 0.975
_Z = 1.959963984540054  # the unit normal's quantile at _UPPER
_CHUNK = 1_000  # resamples drawn at a time: bounds memory at a thousand rows of prompts


@dataclass(frozen=True)
class Interval:
    """A measured number and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_above_zero(self) -> bool:
        """The whole interval lies above zero: a significant gain."""
        return self.low > 0

    @property
    def is_below_zero(self) -> bool:
        """The whole interval lies below zero: a significant loss."""
        return self.high < 0


def accuracy(holds: ArrayLike, *, groups: Sequence[object] | None = None) -> Interval:
    """The share of `holds` that is true, with Wilson's 95 % interval.

    Args:
        groups: The prompt of every image. Given them, the interval is that of the smaller number of independent images
            that would vary as much.

    Example:
        >>> accuracy([True, True, False, True]).value
        0.75
    """
    return _wilson(claims_of(holds, "holds"), groups)


def win_rate(before: ArrayLike, after: ArrayLike, *, groups: Sequence[object]) -> Interval:
    """The share of images that score higher after than before, a tie counting half, with a 95 % interval over prompts.

    The interval is Wilson's, as that of `accuracy`, of as many independent images without ties as would vary as much.

    Example:
        >>> win_rate([1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 4.0, 3.0], groups=["a", "b", "c", "d"]).value
        0.625
    """
    scores_before, scores_after = _scores(before, "before"), _scores(after, "after")
    check_same_length(scores_before, scores_after)
    return _wilson((np.sign(scores_after - scores_before) + 1) / 2, groups)


def _wilson(claims: np.ndarray, groups: Sequence[object] | None) -> Interval:
    """Of numbers in [0, 1], one per image."""
    share = float(claims.mean())
    count = len(claims) if groups is None else _independent_images(claims, _codes(groups, len(claims)))
    spread = _Z**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = np.sqrt(spread * share * (1 - share) + spread**2 / 4) / (1 + spread)
    low = 0.0 if share == 0 else float(centre - half)  # rounding would leave 1e-18 where the formula says 0
    high = 1.0 if share == 1 else float(centre + half)
    return Interval(share, low, high)


def paired_gain(
    before: ArrayLike, after: ArrayLike, *, groups: Sequence[object], seed: int, resamples: int = RESAMPLES
) -> Interval:
    """The mean of `after - before` over images, with a 95 % bootstrap interval over prompts.

    The answer depends on the seed and on the set of (group, before, after), not on their order. A single prompt tells
    nothing about others: its interval is unbounded.

    Args:
        before: One boolean or score per image, of the first model.
        after: The same images (prompt and seed) by the second model.
        groups: The prompt of every image; images of one prompt are resampled together.
        resamples: How many bootstrap samples; 10,000 leaves about a hundredth of the interval's width as noise.
    """
    scores_before, scores_after = _scores(before, "before"), _scores(after, "after")
    check_same_length(scores_before, scores_after)
    difference = scores_after - scores_before
    codes = _codes(groups, len(difference))
    sums, counts = _group_sums(difference, codes)
    value = float(sums.sum() / counts.sum())
    if len(sums) == 1:
        return Interval(value, -np.inf, np.inf)
    if len(sums) < FEW_PROMPTS:
        half = float(_standard_error(sums - value * counts, len(difference)) * _student(len(sums)))
        return Interval(value, value - half, value + half)
    low, high = _bootstrap(sums, counts, np.random.default_rng(seed), resamples)
    return Interval(value, low, high)


def claims_of(values: ArrayLike, name: str) -> np.ndarray:
    """One boolean per image, checked; `name` is what errors call it."""
    claims = np.asarray(values)
    _one_per_image(claims, name)
    if claims.dtype != np.bool_:
        raise InputError(
            f"{name} has dtype {claims.dtype}, but an accuracy counts booleans; "
            "compare scores with a threshold first, or give them to paired_gain"
        )
    return claims


def check_same_length(before: np.ndarray, after: np.ndarray) -> None:
    """Refuse two models judged on different numbers of images."""
    if len(before) != len(after):
        raise InputError(
            f"before has {len(before)} images and after has {len(after)}, but a paired gain compares image by image; "
            "evaluate both models on the same prompts and seeds"
        )


def _bootstrap(sums: np.ndarray, counts: np.ndarray, rng: np.random.Generator, resamples: int) -> tuple[float, float]:
    num_groups = len(sums)
    means = np.empty(resamples)
    for start in range(0, resamples, _CHUNK):
        stop = min(start + _CHUNK, resamples)
        drawn = rng.integers(num_groups, size=(stop - start, num_groups))
        means[start:stop] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    tail = ndtr(-np.sqrt(num_groups / (num_groups - 1)) * _student(num_groups))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _independent_images(claims: np.ndarray, codes: np.ndarray) -> float:
    share = claims.mean()
    num_groups = len(np.unique(codes))
    if claims.min() == claims.max() or num_groups == 1:
        return num_groups  # how alike the images of a prompt are cannot be told: count each prompt once
    residuals, _ = _group_sums(claims - share, codes)
    variance = max(_standard_error(residuals, len(claims)) ** 2, 1e-12)
    of_one_image = share * (1 - share)
    most = len(claims) if claims.dtype == np.bool_ else len(claims) * of_one_image / claims.var()  # halves vary less
    return min(most, of_one_image / variance) * (_Z / _student(num_groups)) ** 2


def _standard_error(residual_sums: np.ndarray, num_images: int) -> float:
    num_groups = len(residual_sums)
    return np.sqrt(num_groups / (num_groups - 1) * (residual_sums**2).sum()) / num_images


def _student(num_groups: int) -> float:
    return float(stdtrit(num_groups - 1, _UPPER))


def _group_sums(values: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # Sorted by value within a group, then by sum between groups: the same floats are added in the same order, and the
    # same draw hits the same group, whatever the order of the images.
    order = np.lexsort((values, codes))
    _, starts, counts = np.unique(codes[order], return_index=True, return_counts=True)
    sums = np.add.reduceat(values[order], starts)
    by_sum = np.lexsort((counts, sums))
    return sums[by_sum], counts[by_sum]


def _scores(values: ArrayLike, name: str) -> np.ndarray:
    scores = np.asarray(values, dtype=np.float64)
    _one_per_image(scores, name)
    if not np.isfinite(scores).all():
        worst = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise InputError(
            f"{name}[{worst}] is {scores[worst]}, but a mean needs finite numbers; "
            "find out why that image has no score, or leave it out of both models"
        )
    return scores


def _one_per_image(values: np.ndarray, name: str) -> None:
    if values.ndim != 1 or len(values) == 0:
        raise InputError(
            f"{name} has shape {values.shape}, but one number per image and at least one image are needed; "
            "give a flat, non-empty list"
        )


def _codes(groups: Sequence[object], count: int) -> np.ndarray:
    if len(groups) != count:
        raise InputError(
            f"groups has {len(groups)} entries for {count} images, but every image needs its prompt; "
            "repeat each prompt once per image"
        )
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups])
