"""Tables of how good a model is and how much better another one is, with intervals; examples that nobody picked.

The statistics are in `rpo.evaluation.intervals`. Two models are compared on the same prompts and seeds, image by image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from rpo.errors import InputError
from rpo.evaluation.intervals import Interval, accuracy, check_same_length, claims_of, paired_gain

__all__ = [
    "OUTCOMES",
    "Accuracy",
    "PairedComparison",
    "Interval",
    "Outcome",
    "accuracy",
    "accuracy_by",
    "compare",
    "compare_by",
    "draw_examples",
    "format_gain",
    "format_share",
    "outcomes",
    "paired_gain",
]

Outcome = Literal["fixed", "broken", "still holds", "still fails"]
"""What became of one image (same prompt, same seed) from the model before to the model after."""

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


@dataclass(frozen=True)
class Accuracy:
    """The share of images that hold, over everything or over one kind of prompt."""

    name: str
    num_images: int
    num_prompts: int
    share: Interval


@dataclass(frozen=True)
class PairedComparison:
    """Two models on the same prompts and seeds; `outcomes` counts what became of the images, in `OUTCOMES` order."""

    name: str
    num_images: int
    num_prompts: int
    before: Interval
    after: Interval
    gain: Interval
    outcomes: tuple[int, ...]
    is_share: bool = True
    """Whether the numbers are shares of images, rather than scores."""


def accuracy_by(holds: ArrayLike, labels: Sequence[str], *, groups: Sequence[object]) -> list[Accuracy]:
    """One `Accuracy` per label (a kind of prompt, say), in the order in which labels first appear."""
    claims, rows = claims_of(holds, "holds"), list[Accuracy]()
    for label, picked in _by_label(labels, len(claims)):
        prompts = [groups[i] for i in picked]
        share = accuracy(claims[picked], groups=prompts)
        rows.append(Accuracy(label, len(picked), len(set(prompts)), share))
    return rows


def compare(name: str, before: ArrayLike, after: ArrayLike, *, groups: Sequence[object], seed: int) -> PairedComparison:
    """Both accuracies and the paired gain between two models judged on the same prompts and seeds."""
    claims_before, claims_after = claims_of(before, "before"), claims_of(after, "after")
    gain = paired_gain(claims_before, claims_after, groups=groups, seed=seed)
    found = outcomes(claims_before, claims_after)
    return PairedComparison(
        name=name,
        num_images=len(found),
        num_prompts=len(set(groups)),
        before=accuracy(claims_before, groups=groups),
        after=accuracy(claims_after, groups=groups),
        gain=gain,
        outcomes=tuple(found.count(outcome) for outcome in OUTCOMES),
    )


def mean_comparison(
    name: str, before: Sequence[float], after: Sequence[float], *, groups: Sequence[object], seed: int = 0
) -> PairedComparison:
    """The mean scores of two models on the same prompts and seeds, and the paired gain."""
    zero = np.zeros(len(before))
    return PairedComparison(
        name=name,
        num_images=len(before),
        num_prompts=len(set(groups)),
        before=paired_gain(zero, before, groups=groups, seed=seed),
        after=paired_gain(zero, after, groups=groups, seed=seed),
        gain=paired_gain(before, after, groups=groups, seed=seed),
        outcomes=(),
        is_share=False,
    )


def compare_by(
    before: ArrayLike, after: ArrayLike, labels: Sequence[str], *, groups: Sequence[object], seed: int
) -> list[PairedComparison]:
    """One `PairedComparison` per label, in the order in which labels first appear."""
    claims_before, claims_after = claims_of(before, "before"), claims_of(after, "after")
    check_same_length(claims_before, claims_after)
    rows = list[PairedComparison]()
    for label, picked in _by_label(labels, len(claims_before)):
        prompts = [groups[i] for i in picked]
        rows.append(compare(label, claims_before[picked], claims_after[picked], groups=prompts, seed=seed))
    return rows


def outcomes(before: ArrayLike, after: ArrayLike) -> list[Outcome]:
    """What became of every image."""
    claims_before, claims_after = claims_of(before, "before"), claims_of(after, "after")
    check_same_length(claims_before, claims_after)
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
        counts: How many to draw of each; fewer are drawn where there are fewer.
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


def _by_label(labels: Sequence[str], count: int) -> list[tuple[str, np.ndarray]]:
    if len(labels) != count:
        raise InputError(
            f"labels has {len(labels)} entries for {count} images, but every image needs one; "
            "repeat each prompt's label once per image"
        )
    return [(label, np.flatnonzero(np.asarray(labels) == label)) for label in dict.fromkeys(labels)]
