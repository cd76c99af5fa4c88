"""What a person asks `rpo sample` for: from words to rows, columns and LoRAs; refused before anything is loaded."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from rpo.data.prompts import SOURCES, read_prompts
from rpo.errors import InputError
from rpo.evaluation.side_by_side import Column
from rpo.files.text import text_fault
from rpo.models.config import ModelConfig

BASE = "base"
"""What the checkpoint without any LoRA is called."""

MOST_COLUMNS = 25
SWEPT = "strength"


@dataclass(frozen=True)
class Wish:
    """What is to be drawn; nothing is the checkpoint's own."""

    model: ModelConfig
    prompts: str
    """A file or a source of prompts, see `rpo.data.prompts`; or texts, with ";" between them."""
    output: Path
    loras: Sequence[str] = ()
    """Files or folders, each with "=strength" or at 1."""
    sweep: str = ""
    """Such as "strength=0:1.5:0.25", which multiplies the strength of every LoRA."""
    compare: Sequence[str] = ()
    """Two LoRAs, or one and "base"."""
    images: int | None = None
    """Of each prompt; 4, or 1 where the columns are strengths or models."""
    seed: int = 0
    """Of the first image of each prompt; the next ones count on."""
    steps: int | None = None
    guidance: float | None = None
    size: str = ""
    """HEIGHTxWIDTH, or one side."""
    rewards: Sequence[str] = ()
    best_of: int | None = None
    """Seeds of each image, of which the first reward chooses the best."""
    draft_steps: int | None = None
    """Steps in which the seeds are drawn to choose from; nothing draws them in full."""
    looks: Sequence[int] = ()
    """Steps after which seeds are dropped that are clear and have no potential."""
    progress: bool = True


@dataclass(frozen=True)
class Lora:
    """A file or folder, and how strongly it counts."""

    path: Path
    strength: float = 1.0

    def __str__(self) -> str:
        """As a person reads it."""
        return f"{self.path} at {self.strength:g}"


@dataclass(frozen=True)
class Ways:
    """How every prompt is drawn."""

    loras: tuple[Lora, ...]
    """What is loaded; the first is the adapter "lora-0", and so on."""
    columns: tuple[Column, ...]
    measured_from: Column | None = None
    """The column that the others' distance is told from."""


def prompts_of(words: str) -> list[str]:
    """The prompts that a person means: those of a file or a source, or the texts between ";"."""
    is_a_name = not re.search(r"[\s;]", words) and ("." in words.strip(".") or "/" in words)
    if Path(words).is_file() or words.partition(":")[0] in SOURCES or is_a_name:
        return read_prompts(words, seed=0)
    texts = [text.strip() for text in words.split(";")]
    if texts[-1] == "":
        texts.pop()
    for number, text in enumerate(texts or [""], start=1):
        if fault := text_fault(text) or ("" if text else "is empty"):
            raise InputError(
                f"prompt {number} of --prompts {words!r} {fault}; expected a file of prompts, or texts with ; between "
                "them; give a text for each"
            )
    return texts


def size_of(words: str) -> tuple[int, int] | None:
    """(height, width) in pixels; nothing for the checkpoint's own."""
    if not words:
        return None
    found = re.fullmatch(r"(\d+)(?:[x×](\d+))?", words)
    if not found:
        raise InputError(f"--size is {words!r}; expected HEIGHTxWIDTH in pixels or one side; give such as 768x512")
    return int(found[1]), int(found[2] or found[1])


def ways_of(wish: Wish) -> Ways:
    """The columns of a sweep, of a comparison, or the one way in which the LoRAs are given."""
    loras = tuple(lora_of(word) for word in wish.loras)
    if wish.compare:
        return _compared(wish)
    if not wish.sweep:
        return Ways(loras, (Column("", _strengths(loras)),))
    if not loras:
        raise InputError("--sweep is given without a LoRA, whose strength it sweeps; expected one; give --lora FILE")
    columns = [
        Column(f"{SWEPT} {factor:g}" + (f" ({BASE})" if factor == 0 else ""), _strengths(loras, factor))
        for factor in swept(wish.sweep)
    ]
    return Ways(loras, tuple(columns), Column(BASE, _strengths(loras, 0.0)))


def check_selection(wish: Wish) -> None:
    """Refuse a choice of images that nothing chooses, or among columns."""
    if wish.best_of is None:
        for name, given in (("--draft-steps", wish.draft_steps), ("--look-after", list(wish.looks))):
            if given:
                raise InputError(f"{name} is {given} without --best-of; expected both; give such as --best-of 8")
        return
    if wish.draft_steps is not None and wish.looks:
        raise InputError(
            f"--draft-steps is {wish.draft_steps} with --look-after {list(wish.looks)}, but drafts are drawn to the "
            "end; expected one of them; leave out --draft-steps"
        )
    if wish.best_of == 1 or not wish.rewards or wish.sweep or wish.compare:
        fault = (
            "with one image"
            if wish.best_of == 1
            else "with --sweep or --compare"
            if wish.rewards
            else "without --reward"
        )
        raise InputError(
            f"--best-of {wish.best_of} is given {fault}; expected two or more images of one column, and a reward that "
            "chooses; give such as --best-of 8 --reward clip-score"
        )


def swept(words: str) -> list[float]:
    """The numbers of "strength=FROM:TO:STEP", both ends among them where the steps meet the last.

    Example:
        >>> swept("strength=0:1.5:0.5")
        [0.0, 0.5, 1.0, 1.5]
    """
    name, _, numbers = words.partition("=")
    start = end = step = Decimal(1)
    try:
        start, end, step = (Decimal(one) for one in numbers.split(":"))
        is_range = all(one.is_finite() for one in (start, end, step)) and step > 0 and end >= start
    except (ValueError, InvalidOperation):
        is_range = False
    if name != SWEPT or not is_range:
        raise InputError(
            f"--sweep is {words!r}; expected {SWEPT}=FROM:TO:STEP, rising; give such as {SWEPT}=0:1.5:0.25"
        )
    count = int((end - start) / step) + 1
    if count > MOST_COLUMNS:
        raise InputError(f"--sweep {words} has {count} columns; expected at most {MOST_COLUMNS}; give a larger step")
    return [float(start + number * step) for number in range(count)]


def adapter(number: int) -> str:
    """What the LoRA of that number is loaded as."""
    return f"lora-{number}"


def lora_of(word: str) -> Lora:
    """A word such as FILE or FILE=0.8; a file whose own name ends so is meant as it is."""
    path, _, strength = word.rpartition("=")
    if not path or Path(word).exists():
        return Lora(Path(word))
    try:
        found = float(strength)
    except ValueError:
        return Lora(Path(word))
    if not math.isfinite(found):
        raise InputError(f"--lora {word}: the strength is {strength}; expected a finite number; 1 is as it was trained")
    return Lora(Path(path), found)


def _compared(wish: Wish) -> Ways:
    if wish.loras or wish.sweep:
        raise InputError(
            "--compare is given with --lora or --sweep; expected it alone, as it names its LoRAs; leave the other out"
        )
    is_base = [word == BASE for word in wish.compare]
    if len(wish.compare) != 2 or all(is_base):  # noqa: PLR2004 - A and B
        raise InputError(
            f"--compare is {' '.join(wish.compare)}; expected two LoRAs, or one and {BASE}; give the files"
        )
    loras = tuple(lora_of(word) for word, base in zip(wish.compare, is_base, strict=True) if not base)
    columns = list[Column]()
    for label, base in zip("AB", is_base, strict=True):
        counts = 0 if base else 1
        own = sum(not one for one in is_base[: len(columns)])  # which of the LoRAs it is
        strengths = {adapter(n): one.strength * (counts if n == own else 0) for n, one in enumerate(loras)}
        columns.append(Column(BASE if base else label, strengths))
    return Ways(loras, tuple(columns), columns[is_base.index(True) if any(is_base) else 0])


def _strengths(loras: Sequence[Lora], factor: float = 1.0) -> dict[str, float]:
    return {adapter(number): lora.strength * factor for number, lora in enumerate(loras)}
