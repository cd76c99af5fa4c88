"""How good a model is and how much better it became, each with the 95 % interval that the number deserves.

Accuracy is a share of images that hold, with Wilson's score interval (E. B. Wilson, JASA 1927): it stays inside [0, 1]
and is right for shares near 0 and 1, where the textbook interval has no width. The gain of one model over another on
the *same* prompts and seeds is the mean difference per image, with a percentile bootstrap that resamples prompts: the
images of one prompt resemble each other, so resampling images would claim a precision that is not there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

Outcome = Literal["fixed", "broken", "still holds", "still fails"]
"""What became of one image (same prompt, same seed) from the model before to the model after."""

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

RESAMPLES = 10_000
_Z = 1.959963984540054  # the two-sided 95 % quantile of the unit normal
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


@dataclass(frozen=True)
class Accuracy:
    """The share of images that hold, over everything or over one kind of prompt."""

    name: str
    num_images: int
    num_prompts: int
    share: Interval


@dataclass(frozen=True)
class Comparison:
    """Two models on the same prompts and seeds; `outcomes` counts what became of the images, in `OUTCOMES` order."""

    name: str
    num_images: int
    num_prompts: int
    before: Interval
    after: Interval
    gain: Interval
    outcomes: tuple[int, ...]


def accuracy(holds: ArrayLike, *, groups: Sequence[object] | None = None) -> Interval:
    """The share of `holds` that is true, with Wilson's 95 % interval.

    Args:
        holds: One boolean per image.
        groups: The prompt of every image. Images of one prompt are not independent; given their prompts, the interval
            is that of the smaller number of independent images that would vary as much (Kish's design effect).

    Returns:
        The share and its interval.

    Raises:
        ValueError: If `holds` is empty or not boolean, or `groups` has another length.

    Example:
        >>> accuracy([True, True, False, True]).value
        0.75
    """
    claims = _claims(holds, "holds")
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
    nothing about others: its interval is unbounded. From about 20 prompts on, the interval can be taken at its word.

    Args:
        before: One boolean or score per image, of the first model.
        after: The same images (prompt and seed) by the second model.
        groups: The prompt of every image; images of one prompt are resampled together.
        seed: Of the resampling.
        resamples: How many bootstrap samples; 10,000 leaves about a hundredth of the interval's width as noise.

    Returns:
        The mean difference and its interval.

    Raises:
        ValueError: If the inputs are empty, differ in length, or hold numbers that are not finite.
    """
    scores_before, scores_after = _scores(before, "before"), _scores(after, "after")
    _same_length(scores_before, scores_after)
    difference = scores_after - scores_before
    codes = _codes(groups, len(difference))
    sums, counts = _group_sums(difference, codes)
    value = float(sums.sum() / counts.sum())
    if len(sums) == 1:
        return Interval(value, -np.inf, np.inf)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for start in range(0, resamples, _CHUNK):
        stop = min(start + _CHUNK, resamples)
        drawn = rng.integers(len(sums), size=(stop - start, len(sums)))
        means[start:stop] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def accuracy_by(holds: ArrayLike, labels: Sequence[str], *, groups: Sequence[object]) -> list[Accuracy]:
    """One `Accuracy` per label (a kind of prompt, say), in the order in which labels first appear."""
    claims, rows = _claims(holds, "holds"), list[Accuracy]()
    for label, picked in _by_label(labels, len(claims)):
        prompts = [groups[i] for i in picked]
        share = accuracy(claims[picked], groups=prompts)
        rows.append(Accuracy(label, len(picked), len(set(prompts)), share))
    return rows


def compare(name: str, before: ArrayLike, after: ArrayLike, *, groups: Sequence[object], seed: int) -> Comparison:
    """Both accuracies and the paired gain between two models judged on the same prompts and seeds.

    Args:
        name: What the row is called in tables.
        before: One boolean per image, of the first model.
        after: The same images by the second model.
        groups: The prompt of every image.
        seed: Of the bootstrap.

    Returns:
        The comparison.
    """
    claims_before, claims_after = _claims(before, "before"), _claims(after, "after")
    gain = paired_gain(claims_before, claims_after, groups=groups, seed=seed)
    found = outcomes(claims_before, claims_after)
    return Comparison(
        name=name,
        num_images=len(found),
        num_prompts=len(set(groups)),
        before=accuracy(claims_before, groups=groups),
        after=accuracy(claims_after, groups=groups),
        gain=gain,
        outcomes=tuple(found.count(outcome) for outcome in OUTCOMES),
    )


def compare_by(
    before: ArrayLike, after: ArrayLike, labels: Sequence[str], *, groups: Sequence[object], seed: int
) -> list[Comparison]:
    """One `Comparison` per label, in the order in which labels first appear."""
    claims_before, claims_after = _claims(before, "before"), _claims(after, "after")
    _same_length(claims_before, claims_after)
    rows = list[Comparison]()
    for label, picked in _by_label(labels, len(claims_before)):
        prompts = [groups[i] for i in picked]
        rows.append(compare(label, claims_before[picked], claims_after[picked], groups=prompts, seed=seed))
    return rows


def outcomes(before: ArrayLike, after: ArrayLike) -> list[Outcome]:
    """What became of every image."""
    claims_before, claims_after = _claims(before, "before"), _claims(after, "after")
    _same_length(claims_before, claims_after)
    names: dict[tuple[bool, bool], Outcome] = {
        (False, True): "fixed",
        (True, False): "broken",
        (True, True): "still holds",
        (False, False): "still fails",
    }
    return [names[bool(b), bool(a)] for b, a in zip(claims_before, claims_after, strict=True)]


def draw_examples(found: Sequence[Outcome], *, counts: Mapping[Outcome, int], seed: int) -> dict[Outcome, list[int]]:
    """Indices of some images of every outcome, drawn at random by `seed`: nobody picked them.

    Args:
        found: The outcome of every image, of `outcomes`.
        counts: How many to draw of each; fewer are drawn where there are fewer.
        seed: Of the draw.

    Returns:
        Indices in rising order, by outcome.
    """
    order = np.random.default_rng(seed).permutation(len(found))
    pools = {outcome: [int(i) for i in order if found[i] == outcome] for outcome in counts}
    return {outcome: sorted(pools[outcome][:count]) for outcome, count in counts.items()}


def format_share(share: Interval) -> str:
    """A share in per cent with its interval, as in `52.3 % [48.1, 56.4]`."""
    return f"{100 * share.value:.1f} % [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def format_gain(gain: Interval) -> str:
    """A difference of shares in points with its interval, as in `+14.2 points [+9.8, +18.5]`."""
    return f"{100 * gain.value:+.1f} points [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"


def _independent_images(claims: np.ndarray, codes: np.ndarray) -> float:
    share = claims.mean()
    num_groups = len(np.unique(codes))
    if share in (0, 1) or num_groups == 1:
        return num_groups  # how alike the images of a prompt are cannot be told: count each prompt once
    residuals, _ = _group_sums(claims - share, codes)
    variance_by_prompt = num_groups / (num_groups - 1) * (residuals**2).sum() / len(claims) ** 2
    return min(len(claims), share * (1 - share) / variance_by_prompt) if variance_by_prompt > 0 else len(claims)


def _group_sums(values: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # Sorted by value within a group, then by sum between groups: the same floats are added in the same order, and the
    # same draw hits the same group, whatever the order of the images.
    order = np.lexsort((values, codes))
    _, starts, counts = np.unique(codes[order], return_index=True, return_counts=True)
    sums = np.add.reduceat(values[order], starts)
    by_sum = np.lexsort((counts, sums))
    return sums[by_sum], counts[by_sum]


def _claims(values: ArrayLike, name: str) -> np.ndarray:
    claims = np.asarray(values)
    _one_per_image(claims, name)
    if claims.dtype != np.bool_:
        raise ValueError(
            f"{name} has dtype {claims.dtype}, but an accuracy counts booleans; "
            "compare scores with a threshold first, or give them to paired_gain"
        )
    return claims


def _scores(values: ArrayLike, name: str) -> np.ndarray:
    scores = np.asarray(values, dtype=np.float64)
    _one_per_image(scores, name)
    if not np.isfinite(scores).all():
        worst = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ValueError(
            f"{name}[{worst}] is {scores[worst]}, but a mean needs finite numbers; "
            "find out why that image has no score, or leave it out of both models"
        )
    return scores


def _one_per_image(values: np.ndarray, name: str) -> None:
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(
            f"{name} has shape {values.shape}, but one number per image and at least one image are needed; "
            "give a flat, non-empty list"
        )


def _same_length(before: np.ndarray, after: np.ndarray) -> None:
    if len(before) != len(after):
        raise ValueError(
            f"before has {len(before)} images and after has {len(after)}, but a paired gain compares image by image; "
            "evaluate both models on the same prompts and seeds"
        )


def _codes(groups: Sequence[object], count: int) -> np.ndarray:
    if len(groups) != count:
        raise ValueError(
            f"groups has {len(groups)} entries for {count} images, but every image needs its prompt; "
            "repeat each prompt once per image"
        )
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups])


def _by_label(labels: Sequence[str], count: int) -> list[tuple[str, np.ndarray]]:
    if len(labels) != count:
        raise ValueError(
            f"labels has {len(labels)} entries for {count} images, but every image needs one; "
            "repeat each prompt's label once per image"
        )
    return [(label, np.flatnonzero(np.asarray(labels) == label)) for label in dict.fromkeys(labels)]
