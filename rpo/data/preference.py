"""The preference record: a prompt, the image that was preferred for it, and the one that was not.

An image stays encoded (a file, bytes, or a cell of a table) until somebody asks for its pixels, so that a set of any
length can be held. Every error names the record, because a set is repaired record by record.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, overload

import numpy as np
from PIL import Image

from rpo.data.image_facts import ImageFacts, ImageSource, digest_of, facts_of, read_image, recalled
from rpo.data.pixels import Seen, decode_image
from rpo.errors import InputError
from rpo.files.text import text_fault

Side = Literal["chosen", "rejected"]
SIDES: tuple[Side, Side] = ("chosen", "rejected")

Picture = Literal["chosen", "rejected", "original"]
"""A side, or the image that both sides are edits of."""


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One preference: for `prompt`, `chosen` is better than `rejected`.

    Example:
        >>> pair = PreferencePair("a red circle", chosen="good.png", rejected="bad.png", name="first")
    """

    prompt: str
    chosen: ImageSource = field(repr=False)
    rejected: ImageSource = field(repr=False)
    chosen_score: float | None = None
    """Score that a judge gave to the chosen image, on the judge's own scale; higher is better."""
    rejected_score: float | None = None
    """Score of the rejected image from the same judge."""
    source: str = ""
    """Where the pair comes from: a data set, or the tool that made it."""
    seed: int | None = None
    """Seed that the images were sampled with."""
    details: Mapping[str, str | int | float] = field(default_factory=dict, hash=False)
    """Further provenance, named as in `rpo.data.columns.DETAIL_COLUMNS`."""
    original: ImageSource | None = field(default=None, repr=False)
    """The image of which both sides are edits, by the instruction that is then the prompt."""
    name: str = field(default="", compare=False)
    """What a person calls the record ("metadata.jsonl:17"); every error about it begins so."""
    _facts: dict[Picture, ImageFacts] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def margin(self) -> float | None:
        """Chosen minus rejected score; None unless both are known."""
        if self.chosen_score is None or self.rejected_score is None:
            return None
        return self.chosen_score - self.rejected_score

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """The images that it has."""
        return SIDES if self.original is None else (*SIDES, "original")

    @property
    def key(self) -> str:
        """Identity of the record: sha256 of the prompt and of all images' bytes, in this order."""
        return pair_key(self.prompt, *(self.facts(one).digest for one in self.pictures))

    def encoded(self, side: Picture) -> bytes:
        """The encoded bytes of one image; an `InputError` if it is missing or cannot be read."""
        return read_image(self._source(side), self._image_name(side))

    def facts(self, side: Picture) -> ImageFacts:
        """Content hash and size of one image, read once from its bytes and header; an `InputError` if it is none."""
        if side not in self._facts:
            self._facts[side] = facts_of(self.encoded(side), self._image_name(side))
        return self._facts[side]

    def decode(self, side: Picture) -> Image.Image:
        """The pixels of one image as a viewer shows them: upright, RGB; raises as `seen` does."""
        return self.seen(side).image

    def seen(self, side: Picture) -> Seen:
        """The pixels of one image, and what had to be done to show them.

        An `InputError` if it is missing or corrupt, or was changed since its content hash was taken.
        """
        data = self.encoded(side)
        seen = decode_image(data, self._image_name(side))
        if side in self._facts and self._facts[side].digest != digest_of(data):
            raise InputError(
                f"{self._image_name(side)} was changed while it was in use; expected the content it had when the set "
                "was read; start again"
            )
        return seen

    def _source(self, side: Picture) -> ImageSource:
        source = {"chosen": self.chosen, "rejected": self.rejected, "original": self.original}[side]
        if source is None:
            raise InputError(f"{self.name}: there is no original image; expected the one that was edited; give it")
        return source

    def _image_name(self, side: Picture) -> str:
        source = self._source(side)
        place = str(source) if isinstance(source, str | Path) else "stored in the record"
        return f"{self.name or 'a nameless record'}: the {side} image ({place})"


@dataclass(frozen=True)
class PairSet:
    """Preference records in order, where they came from, and how many rows were left out and why."""

    pairs: tuple[PreferencePair, ...]
    origin: str = "memory"
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Rows left out, by reason: "tie", "unlabelled"."""
    ignored_columns: tuple[str, ...] = ()
    """Columns that were found and not used; a misspelt optional column shows up here."""

    def __len__(self) -> int:
        """Number of records."""
        return len(self.pairs)

    def __iter__(self) -> Iterator[PreferencePair]:
        """The records in order."""
        return iter(self.pairs)

    @overload
    def __getitem__(self, index: int) -> PreferencePair: ...
    @overload
    def __getitem__(self, index: slice) -> "PairSet": ...
    def __getitem__(self, index: int | slice) -> "PreferencePair | PairSet":
        """One record, or a smaller set of the same origin."""
        if isinstance(index, slice):
            return replace(self, pairs=self.pairs[index])
        return self.pairs[index]

    @property
    def prompts(self) -> tuple[str, ...]:
        """The distinct prompts, in order of first appearance."""
        return tuple(dict.fromkeys(pair.prompt for pair in self.pairs))


def recalled_pairs(pairs: Iterable[PreferencePair]) -> Iterator[PreferencePair]:
    """Pairs in order, each told what is known of its images; what is learnt of them on the way is kept."""
    return recalled(pairs, lambda pair: ((pair._facts, one, pair._source(one)) for one in pair.pictures))


def counted(dropped: Mapping[str, int]) -> str:
    """How many rows were left out, by reason."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()) if count)


def left_out(pairs: PairSet) -> str:
    """What was left out of a set and why, in a sentence; empty if nothing was."""
    return f"left out: {text}" if (text := counted(pairs.dropped)) else ""


def pair_set(
    pairs: Iterable[PreferencePair],
    *,
    origin: str = "memory",
    allow_size_mismatch: bool = False,
    allow_empty_prompts: bool = False,
) -> PairSet:
    """A set of records made in memory: named where they have no name, and checked as those of a file are.

    Args:
        pairs: The records.
        origin: What to call the set in messages.
        allow_size_mismatch: Accept pairs whose two images differ in size; the transform then centres each on its own.
        allow_empty_prompts: Accept records without a prompt.

    Raises:
        ValueError: The set is empty, or a record is not sound.
    """
    named = tuple(pair if pair.name else replace(pair, name=f"{origin}:{i}") for i, pair in enumerate(pairs))
    if not named:
        raise InputError(f"{origin}: no preference pairs; expected at least one; give records")
    for pair in named if allow_size_mismatch else recalled_pairs(named):
        require_sound(pair, allow_size_mismatch=allow_size_mismatch, allow_empty_prompts=allow_empty_prompts)
    return PairSet(named, origin)


def require_sound(pair: PreferencePair, *, allow_size_mismatch: bool, allow_empty_prompts: bool) -> None:
    """Refuse a record that cannot be trained on, as far as its text and its images' headers tell."""
    if not allow_empty_prompts and not pair.prompt.strip():
        raise InputError(
            f"{pair.name}: the prompt is empty; expected a caption; write one, or pass allow_empty_prompts=True to "
            "train on it without a caption"
        )
    if fault := text_fault(pair.prompt):
        raise InputError(f"{pair.name}: the prompt {fault}; expected plain text; mend or remove the record")
    if allow_size_mismatch:
        return  # without a comparison there is no need to read every image before the first step
    if pair.facts("chosen").digest == pair.facts("rejected").digest:
        raise _same_image(pair.name)
    sizes = {one: pair.facts(one).size for one in pair.pictures}
    if len(set(sizes.values())) > 1:
        (width, height), *others = sizes.values()
        shown = "".join(f", the {one} one {w}x{h}" for one, (w, h) in zip(pair.pictures[1:], others, strict=True))
        raise InputError(
            f"{pair.name}: the chosen image is {width}x{height}{shown}; expected images of one size; resize them, or "
            "pass allow_size_mismatch=True to let the transform bring them to one size"
        )


def require_two_images(pair: PreferencePair) -> None:
    """Refuse a record whose two images, decoded, have the same pixels: it says nothing, and still moves the weights."""
    if pair.decode("chosen") == pair.decode("rejected"):
        raise _same_image(pair.name)


def _same_image(name: str) -> InputError:
    return InputError(f"{name}: the two images are one and the same; expected a better and a worse one; remove it")


def pair_key(prompt: str, *digests: str) -> str:
    """Identity of a record from its prompt and the content hashes of its images: chosen, rejected, original."""
    text = hashlib.sha256(prompt.encode("utf-8")).hexdigest()
    return hashlib.sha256("".join((text, *digests)).encode()).hexdigest()


def pairs_identity(pairs: PairSet) -> dict[str, str]:
    """What a set consists of, in order, as text by name: prompts, the images of each side, scores."""
    for pair in recalled_pairs(pairs):
        for one in pair.pictures:
            pair.facts(one)
    parts: dict[str, Iterable[str]] = {
        "prompts of the pairs": (hashlib.sha256(pair.prompt.encode()).hexdigest() for pair in pairs),
        "chosen images": (pair.facts("chosen").digest for pair in pairs),
        "rejected images": (pair.facts("rejected").digest for pair in pairs),
        "scores of the pairs": (f"{pair.chosen_score} {pair.rejected_score}\n" for pair in pairs),
    }
    if any(pair.original is not None for pair in pairs):
        parts["original images"] = (pair.facts("original").digest for pair in pairs if pair.original is not None)
    return {"pairs": str(len(pairs))} | {name: _digest_of_all(part)[:16] for name, part in parts.items()}


def _digest_of_all(parts: Iterable[str]) -> str:
    """sha256 of texts behind each other, without holding them all."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode())
    return digest.hexdigest()


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode uint8 RGB pixels [height, width, 3] as PNG, without loss."""
    if pixels.dtype != np.uint8 or pixels.shape[2:] != (3,):
        raise InputError(
            f"pixels are {pixels.dtype} {list(pixels.shape)}; expected uint8 [height, width, 3]; "
            "convert an image in [0, 1] by (image * 255).round()"
        )
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()
