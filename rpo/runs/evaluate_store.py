"""What an evaluation keeps as it goes: images, scores, and what it was asked for; a kill costs what was under way."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from rpo.data.pixels import decode_image
from rpo.data.preference import encode_png
from rpo.errors import InputError
from rpo.evaluation.result import RESULT
from rpo.files.text import read_text
from rpo.files.whole import append_line, mend_last_line, numbered_lines, parse_line, write_whole, written_whole
from rpo.runs.sample import slug

PINNED, SCORES, IMAGES = "pinned.json", "scores.jsonl", "images"

FREE = ("source",)
"""What a person calls a thing, whose content counts."""


def claim(folder: Path, *, resume: bool) -> None:
    """Refuse a folder that holds anything, unless it is an evaluation that goes on."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if names and PINNED not in names:
        raise InputError(
            f"{folder} holds {sorted(names)[0]} and is no evaluation; expected a new folder; give another --output"
        )
    if names and not resume:
        state = "a finished evaluation" if RESULT in names else "an evaluation that was begun"
        raise InputError(f"{folder} already holds {state}; expected a new folder; give another --output, or --resume")


@final
class Kept:
    """Files of one evaluation's folder.

    Attributes:
        folder: Where it is.
    """

    CANDIDATES: ClassVar[str] = "candidates of best-of-N"
    """Whose scores are those of best-of-N's further candidates."""

    def __init__(self, folder: Path, labels: Sequence[str], pinned: Mapping[str, Any]):
        """Read what is there; refuses the folder of another evaluation."""
        self.folder = folder
        self._names = {label: f"{number}-{slug(label) or 'model'}" for number, label in enumerate(labels)}
        self._scores: dict[tuple[str, str, bool], dict[int, list[float]]] = {}
        self._chosen: dict[int, list[int]] = {}
        if (file := folder / PINNED).is_file():
            _refuse_other(pinned, parse_line(read_text(file), str(file)), folder)
        else:
            write_whole(file, json.dumps(pinned, indent=1, ensure_ascii=False) + "\n")
        mend_last_line(folder / SCORES)
        for name, text in numbered_lines(folder / SCORES):
            row: dict[str, Any] = parse_line(text, name)
            self._take(row["model"], row["by"], row["first"], row["values"], row["is_diversity"])

    def file(self, label: str, prompt: int, image: int) -> Path:
        """Where an image is kept: of a model, image k of prompt i, both counted from 0."""
        return self.folder / IMAGES / self._names[label] / f"{prompt:04d}-{image}.png"

    def write(self, files: Sequence[Path], pixels: NDArray[np.uint8]) -> None:
        """Write images, each whole or not at all."""
        for file, one in zip(files, pixels, strict=True):
            with written_whole(file) as partial:
                partial.write_bytes(encode_png(one))

    def read(self, files: Sequence[Path]) -> NDArray[np.uint8]:
        """Images [n, height, width, 3]."""
        return np.stack([np.asarray(decode_image(file.read_bytes(), str(file)).image) for file in files])

    def add(self, label: str, by: str, first: int, values: Sequence[float], *, is_diversity: bool = False) -> None:
        """Keep what is said of the prompts from `first` on, unless it is there."""
        if not self.scores(label, by, first, is_diversity=is_diversity):
            row = {"model": label, "by": by, "first": first, "is_diversity": is_diversity, "values": list(values)}
            append_line(self.folder / SCORES, row)
            self._take(label, by, first, values, is_diversity)

    def scores(self, label: str, by: str, first: int, *, is_diversity: bool = False) -> list[float]:
        """What is known of the prompts from `first` on; empty if nothing is."""
        return self._scores.get((label, by, is_diversity), {}).get(first, [])

    def all(self, label: str, by: str, *, is_diversity: bool = False) -> list[float]:
        """What is known of all prompts, in their order."""
        return [one for _, values in sorted(self._scores[label, by, is_diversity].items()) for one in values]

    def choose(self, first: int, images: Sequence[int]) -> None:
        """Note which images best-of-N chose; it follows from the scores."""
        self._chosen[first] = list(images)

    @property
    def chosen(self) -> tuple[int, ...]:
        """Numbers of the base's images that best-of-N chose, in the order of the images."""
        return tuple(one for _, images in sorted(self._chosen.items()) for one in images)

    def _take(self, label: str, by: str, first: int, values: Sequence[float], is_diversity: bool) -> None:
        self._scores.setdefault((label, by, is_diversity), {})[first] = list(values)


def _refuse_other(now: Mapping[str, Any], before: Mapping[str, Any], folder: Path) -> None:
    ours, theirs = dict(_flat(now)), dict(_flat(before))
    both = [name for name in dict.fromkeys([*theirs, *ours]) if name in ours and name in theirs]
    names = both if ours["models"] != theirs["models"] else dict.fromkeys([*theirs, *ours])
    changed = [name for name in names if ours.get(name) != theirs.get(name)]
    if changed:
        told = [f"{name} was {theirs.get(name, 'nothing')} and is {ours.get(name, 'nothing')}" for name in changed[:3]]
        more = f", and {len(changed) - 3} more" if len(changed) > len(told) else ""
        raise InputError(
            f"{folder} holds another evaluation: {'; '.join(told)}{more}; expected the same, for its numbers to be "
            "comparable; repeat the command as it was, or give another --output"
        )


def _flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Every value by a dotted name; the prompts themselves are told by their hash."""
    if isinstance(value, Mapping):
        parts = [(f"{name}.{key}".strip("."), one) for key, one in value.items() if key not in FREE]
        return [pair for key, one in parts if key != "prompts.list" for pair in _flat(one, key)]
    if isinstance(value, list):  # of models
        labels = [one["label"] for one in value]
        parts = zip(labels, value, strict=True)
        return [(name, ", ".join(labels)), *(pair for label, one in parts for pair in _flat(one, f"{name}.{label}"))]
    return [(name, value)]
