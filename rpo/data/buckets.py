"""Aspect-ratio buckets: images of about one shape are trained at one size, so that little is cut and nothing enlarged.

A bucket is a canvas whose sides are multiples of a step and whose area is at most that of the nominal canvas. An image
is shrunk to cover its bucket and never enlarged; one of less area has a bucket of less area. The two sides of a pair
share one: of two sizes it is the bucket of the largest image that fits into both, and into the one that they edit.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from rpo.data.preference import PreferencePair, recalled_pairs
from rpo.errors import InputError
from rpo.types import Canvas

Size = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True)
class Buckets:
    """Which pairs of a set are trained at which size."""

    canvases: tuple[Canvas, ...]
    members: tuple[Sequence[int], ...]
    """Pairs of each canvas, by their place in the set."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Pairs of each canvas."""
        return tuple(map(len, self.members))

    @property
    def of_pair(self) -> list[int]:
        """The bucket of each pair."""
        found = [0] * sum(self.counts)
        for bucket, members in enumerate(self.members):
            for pair in members:
                found[pair] = bucket
        return found

    def notes(self, group: int = 1) -> list[str]:
        """What a person should know of them; `group` pairs are trained together, which are of one bucket."""
        sized = sorted(zip(self.counts, self.canvases, strict=True))
        (fewest, small), (most, large) = sized[0], sized[-1]
        lines = [
            f"{len(sized)} buckets (height x width): {large} has most pairs ({most}), {small} fewest ({fewest})"
            if len(sized) > 1
            else f"1 bucket (height x width): {large} ({most} pairs)"
        ]
        few = [one for one, count in zip(self.canvases, self.counts, strict=True) if count < group]
        if few:
            lines.append(
                f"{len(few)} of them have fewer pairs than the {group} that are trained together, so that a pair may "
                f"be there twice: {', '.join(map(str, few[:_SHOWN]))}{' …' if len(few) > _SHOWN else ''}"
            )
        return lines


_SHOWN = 5


def one_bucket(count: int, canvas: Canvas) -> Buckets:
    """All of so many pairs, cut to one canvas."""
    return Buckets((canvas,), (range(count),))


def make_buckets(pairs: Iterable[PreferencePair], canvas: Canvas, step: int) -> Buckets:
    """The buckets of a set; looks at the header of every image that is not known yet.

    Raises `InputError` naming the first pair whose images are smaller than any bucket, or the step of none.
    """
    require_step(canvas, step)
    members: dict[Canvas, list[int]] = defaultdict(list)
    for index, pair in enumerate(recalled_pairs(pairs)):
        size = common_size(pair)
        found = bucket_of(size, canvas, step)
        if found is None:
            raise InputError(
                f"{pair.name}: {size[0]} px wide and {size[1]} high is less than the smallest bucket, {step}x{step}, "
                f"and images are not enlarged; remove the pair, give a smaller bucket_step, or leave bucket_step out"
            )
        members[found].append(index)
    return Buckets(tuple(sorted(members)), tuple(members[one] for one in sorted(members)))


def require_step(canvas: Canvas, step: int) -> None:
    """Refuse a step of which no bucket within a canvas can be made."""
    if not 1 <= step <= min(canvas):
        raise InputError(
            f"bucket_step is {step}; expected 1 to {min(canvas)}, the shorter side of {canvas}; give 64 or 32"
        )


def common_size(pair: PreferencePair) -> Size:
    """The largest that fits into all images of a pair, the edited one included, so that none is enlarged."""
    widths, heights = zip(*(pair.facts(one).size for one in pair.pictures), strict=True)
    return min(widths), min(heights)


@lru_cache(maxsize=4096)
def bucket_of(size: Size, canvas: Canvas, step: int) -> Canvas | None:
    """The bucket of an image, the one that uses most of it; None if the image is smaller than all.

    For each length of the short side it is the longest that neither area nor image forbids; what is used is the share
    of the image that is left where it is cut to the bucket's shape, times the bucket's area.

    Example:
        >>> bucket_of((1600, 900), Canvas(512, 512), 64)
        Canvas(height=384, width=640)
    """
    (width, height), most = size, canvas.height * canvas.width
    if height > width:
        turned = bucket_of((height, width), canvas, step)
        return turned and Canvas(turned.width, turned.height)
    best, widest = None, width // step * step
    for high in range(step, height + 1, step):
        wide = min(widest, most // high // step * step)
        if wide >= step:
            left = min(wide * height, width * high) / max(wide * height, width * high)
            best = max(best or (0.0,), (round(high * wide * left / most, 3), left, high, wide))
    return Canvas(*best[2:]) if best else None
