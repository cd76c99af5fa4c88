"""What must hold of a preference set, seen on its records and on a few of its images; `rpo data check` opens all."""

from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import median
from typing import TypeVar

from rpo.data.preference import SIDES, PairSet, require_two_images
from rpo.models.checkpoint import Checkpoint
from rpo.trainers.checks.preflight import Check
from rpo.trainers.pairs.sizes import Sizes
from rpo.types import Canvas

Thing = TypeVar("Thing")

OPENED, MEASURED, READ = 8, 256, 1000
"""At most so many pairs are decoded and measured, and captions read, evenly over the set."""

SHOWN = 3

MANY = 0.5
"""A fault that more than this part of a set has is told as a failure."""


def record_checks(pairs: PairSet, trained: Sizes, at_once: int) -> Iterator[Check]:
    """Labels, then sizes, then the images themselves, which may be refused; so many pairs are trained together."""
    yield labels(pairs)
    yield sizes(pairs, trained.canvas) if not trained.notes else buckets(trained, at_once)
    opened = spread_over(pairs.pairs, OPENED)
    for pair in opened:
        require_two_images(pair)
        pair.decode(pair.pictures[-1])
    some, whole = (sum(len(pair.pictures) for pair in found) for found in (opened, pairs))
    yield Check("images decode", True, f"{some} of {whole} were, and no pair is one image twice")


def labels(pairs: PairSet) -> Check:
    """Whether the scores agree with which image is called the chosen one."""
    margins = [pair.margin for pair in pairs if pair.margin is not None]
    if not margins:
        return Check("labels", True, "no record has both scores, so nothing says whether the labels are right")
    negative, zero = sum(one < 0 for one in margins), sum(one == 0 for one in margins)
    return Check(
        "labels",
        negative <= MANY * len(margins),
        f"the chosen score is the lower one in {negative / len(margins):.1%} of {len(margins)} records (equal in "
        f"{zero}), the median margin is {median(margins):.3g}",
        "chosen and rejected are swapped, or the score is a cost: exchange the two columns (with their scores), or the "
        "sign of the scores",
    )


def sizes(pairs: PairSet, canvas: Canvas) -> Check:
    """What sizes there are, and whether they carry the canvas that is trained at; all are cut to that one."""
    measured = spread_over(pairs.pairs, MEASURED)
    found = Counter(pair.facts(side).size for pair in measured for side in SIDES)
    small = sum(count for (wide, high), count in found.items() if wide < canvas.width or high < canvas.height)
    told = ", ".join(f"{high}x{wide} ({count})" for (wide, high), count in found.most_common(SHOWN))
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return Check(
        "sizes",
        small <= MANY * found.total(),
        f"{told}{more}; trained at {canvas}, for which {small / found.total():.1%} are too small",
        f"images are enlarged to {canvas} and blur is learnt: set resolution to the size that most images have",
    )


def buckets(trained: Sizes, at_once: int) -> Check:
    """Whether every bucket has more than one pair to be trained together."""
    counts = trained.buckets.counts
    alone = [str(one) for one, count in zip(trained.buckets.canvases, counts, strict=True) if count == 1]
    return Check(
        "buckets",
        at_once == 1 or not alone,
        "; ".join(trained.notes),
        "a pair that is alone in its bucket is trained beside copies of itself: give a larger bucket_step, or leave "
        f"out the pairs of {', '.join(alone)}",
    )


def captions(model: Checkpoint, prompts: Sequence[str]) -> Check:
    """Whether captions say something, and the text encoders read them to their end."""
    some = spread_over(tuple(dict.fromkeys(prompts)), READ)
    empty, cut = sum(not one.strip() for one in some), sum(bool(model.notes_on([one])) for one in some)
    return Check(
        "captions",
        not empty and cut <= MANY * len(some),
        f"{empty} of {len(some)} are empty, {cut} are cut by the text encoder",
        "write captions for all records, and shorten those that are cut: what is cut off is never trained on",
    )


def spread_over(things: Sequence[Thing], count: int) -> Sequence[Thing]:
    """So many of them, evenly over all."""
    return things[:: max(1, -(-len(things) // count))]
