"""How many captions are longer than what a text encoder takes, and which of them are the same to it.

What is cut off is never trained on, and captions that differ only there train as one.
"""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

CLIP_TOKENS = 77
"""Context of CLIP's text encoder, its two marks included; a word takes at least one token."""

_MARKS = 2

Kept = Callable[[str], tuple[Hashable, bool]]
"""From a caption to what of it is encoded, and whether that is less than all."""


@dataclass(frozen=True)
class CutCaptions:
    """Captions that are too long for a text encoder."""

    captions: int
    """Distinct ones that were looked at."""
    cut: int
    merged: int
    """Those of them that are encoded as another caption is."""
    limit: str
    """What is taken, in words."""

    def __str__(self) -> str:
        """One line; empty if none is cut."""
        if not self.cut:
            return ""
        equal = f", and {self.merged} of them became equal to another" if self.merged else ""
        return f"{self.cut} of {self.captions} captions are too long for {self.limit} and are cut{equal}"


def cut_captions(captions: Iterable[str], kept: Kept, limit: str) -> CutCaptions:
    """Count the captions that are cut."""
    distinct = set(captions)
    seen: dict[Hashable, int] = {}
    cut: list[Hashable] = []
    for caption in distinct:
        key, is_cut = kept(caption)
        seen[key] = seen.get(key, 0) + 1
        cut += [key] if is_cut else []
    return CutCaptions(len(distinct), len(cut), sum(seen[key] > 1 for key in cut), limit)


def surely_cut(captions: Iterable[str]) -> CutCaptions:
    """The captions that CLIP cuts whatever its tokenizer makes of them: those of more words than it takes tokens."""
    room = CLIP_TOKENS - _MARKS

    def kept(caption: str) -> tuple[Hashable, bool]:
        words = caption.split()
        return tuple(words[:room]), len(words) > room

    return cut_captions(captions, kept, f"the {CLIP_TOKENS} tokens of CLIP (at least; --model counts them)")
