"""From the columns of somebody's table to a preference record: one function per known form.

Preference sets of other tools are not read. Each is named, so that the advice is one that helps, and nothing is trained
on that was half understood.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

from rpo.data.image_facts import ImageSource
from rpo.data.preference import PreferencePair
from rpo.errors import InputError
from rpo.files.text import text_fault

Row = Mapping[str, object]
FormName = Literal["native", "files", "pickapic"]
AnyForm = FormName | Literal["auto"]
"""The form that a caller says a table has; "auto" looks at the columns."""

CURATION_COLUMNS = (
    "record",
    "chosen_is",
    "rejected_is",
    "instructor_model",
    "critic_prompt_sha256",
    "instructor_prompt_sha256",
    "editor_licence",
    "scores",
    "distance",
)
"""What `rpo curate` says besides: id of the record; whether a side is a source or an edit; who wrote the instruction;
the prompt templates; what binds edits; every reward's scores as JSON; mean absolute difference of source and edit."""

DETAIL_COLUMNS = (
    "prompt_id",
    "critique",
    "edit_instruction",
    "generator_model",
    "editor_model",
    "critic_model",
    "label_source",
    "source_row",
    *CURATION_COLUMNS,
)
"""The optional columns that say how a pair came to be, in the order in which they are written: kept and handed on, and
nothing is trained on them."""

NUMBERS = {"source_row": int, "distance": float}
"""Those that are numbers where a column has one type; the others are text."""


@dataclass(frozen=True)
class Form:
    """The columns by which a form is recognised, and those it can use beside them."""

    text: tuple[str, ...]
    images: tuple[str, str]
    optional: tuple[str, ...]
    original: str = ""
    """Where the image is that both others are edits of; for pairs of edits."""

    @property
    def required(self) -> tuple[str, ...]:
        """Every column that must be there."""
        return self.text + self.images


@dataclass(frozen=True)
class Dropped:
    """A row that holds no preference, and why: "tie" or "unlabelled"."""

    reason: str


_TIE = 0.5  # as label_0 of Pick-a-Pic
_OPTIONAL = ("chosen_score", "rejected_score", "source", "seed", "key", *DETAIL_COLUMNS)
FORMS: dict[FormName, Form] = {
    "native": Form(("prompt",), ("chosen", "rejected"), _OPTIONAL, "original"),
    "files": Form(("prompt",), ("chosen_file_name", "rejected_file_name"), _OPTIONAL, "original_file_name"),
    "pickapic": Form(("caption", "label_0"), ("jpg_0", "jpg_1"), ("has_label", "label_1")),
}


def recognise(columns: Collection[str], origin: str, form: AnyForm = "auto") -> FormName:
    """Which form a table has."""
    candidates: dict[FormName, Form] = FORMS if form == "auto" else {form: FORMS[form]}
    found: list[FormName] = [name for name, candidate in candidates.items() if set(candidate.required) <= set(columns)]
    if len(found) > 1:
        raise InputError(
            f"{origin}: has the columns of {len(found)} forms, {' and '.join(found)}, which may contradict each other; "
            "expected one; remove the columns of the other, or read it with form=…"
        )
    if found:
        return found[0]
    if foreign := _foreign_columns(columns):
        raise InputError(f"{origin}: {foreign}")
    expected = " or ".join(f"{', '.join(candidate.required)} ({name})" for name, candidate in candidates.items())
    raise InputError(
        f"{origin}: found the columns {', '.join(sorted(columns)) or '(none)'}; expected {expected}; rename the columns"
    )


def ignored(columns: Iterable[str], form: FormName) -> tuple[str, ...]:
    """The columns that reading this form makes no use of."""
    known = FORMS[form]
    return tuple(sorted(set(columns) - {*known.required, *known.optional, known.original}))


def parse(form: FormName, row: Row, image_of: Callable[[str], ImageSource], *, name: str) -> PreferencePair | Dropped:
    """The record that a row holds, or why it holds none."""
    if form == "pickapic":
        return _parse_pickapic(row, image_of, name)
    images = FORMS[form].images
    details: dict[str, str | int | float] = {}
    for column in DETAIL_COLUMNS:
        value = _number(row, column, name, NUMBERS[column]) if column in NUMBERS else row.get(column)
        if isinstance(value, str) or _is_number(value):
            details[column] = value
        elif value is not None:
            raise InputError(f"{name}: {column} is {value!r}; expected text or a number; mend or remove the record")
    return PreferencePair(
        prompt=_text(row, "prompt", name),
        chosen=image_of(images[0]),
        rejected=image_of(images[1]),
        chosen_score=_number(row, "chosen_score", name),
        rejected_score=_number(row, "rejected_score", name),
        source=_text(row, "source", name) if row.get("source") is not None else "",
        seed=_number(row, "seed", name, int),
        details=details,
        original=image_of(FORMS[form].original) if row.get(FORMS[form].original) is not None else None,
        name=name,
    )


def _parse_pickapic(row: Row, image_of: Callable[[str], ImageSource], name: str) -> PreferencePair | Dropped:
    label = _number(row, "label_0", name)
    if row.get("has_label") is False or label is None:
        return Dropped("unlabelled")
    if label == _TIE:
        return Dropped("tie")
    if label not in (0.0, 1.0):
        raise InputError(f"{name}: label_0 is {label}; expected 1, 0 or 0.5 (a tie); mend or remove the row")
    other = _number(row, "label_1", name)
    if other is not None and label + other != 1:
        raise InputError(f"{name}: label_0 is {label} and label_1 {other}; expected two that add up to 1; mend the row")
    chosen, rejected = ("jpg_0", "jpg_1") if label == 1.0 else ("jpg_1", "jpg_0")
    prompt = _text(row, "caption", name)
    return PreferencePair(prompt, image_of(chosen), image_of(rejected), source="pickapic", name=name)


def _text(row: Row, column: str, name: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise InputError(f"{name}: {column} is {value!r}; expected text; mend or remove the record")
    if fault := text_fault(value):
        raise InputError(f"{name}: {column} {fault}; expected plain text; mend or remove the record")
    return value


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(row: Row, column: str, name: str, kind: type[int] | type[float] = float) -> Any:
    value = row.get(column)
    if value is None:
        return None
    if not (_is_number(value) and isinstance(value, int | kind)):
        expected = "a whole number" if kind is int else "a finite number"
        raise InputError(f"{name}: {column} is {value!r}; expected {expected}; mend or remove the record")
    return kind(value)


_TO_METADATA = "write metadata.jsonl in its folder, a line a pair, with prompt, chosen_file_name and rejected_file_name"
_BY_COLUMNS = (
    ("HPDv2", {"image_path", "human_preference"}, "of image_path the one whose human_preference is 1 is chosen"),
    ("HPDv2 (ranked)", {"image_path", "rank"}, "of two images of image_path the chosen one has the lower rank"),
    ("HPDv3", {"path1", "path2"}, "unpack its images; by its card path1 is the chosen one and path2 the rejected"),
    ("InvokeAI", {"image_0", "image_1", "prefer_0", "prefer_1"}, "the chosen image is the one whose prefer_ is true"),
    ("WebDataset", {"__key__"}, "unpack the tar files; the images of a pair have one key"),
)
"""Name of the tool or set, columns that give it away, and which image is the chosen one."""

_FOLDERS = (("win", "lose"), ("winner", "loser"), ("winners", "losers"), ("chosen", "rejected"), ("good", "bad"))
_TABLES = (".csv", ".tsv", ".xlsx", ".txt")
_KEY = re.compile(rb'"([A-Za-z_0-9]+)"\s*:')
_LOOK = 1 << 16  # bytes of a JSON file in which the keys of its first object are


def _foreign_columns(columns: Collection[str]) -> str:
    """What a table with these columns is and what to do with it; empty for one that nobody knows."""
    for name, marks, which in _BY_COLUMNS:
        if marks <= set(columns):
            return f"this is a set of {name}, which is not read as it is; {_TO_METADATA}: {which}"
    return ""


def foreign_source(path: Path) -> str:
    """The same of a file or folder on this disk, as far as its name and first bytes tell."""
    if path.is_dir():
        return _foreign_folder(path)
    if path.suffix == ".tar" or path.name.endswith((".tar.gz", ".tgz")):
        return _foreign_columns(("__key__",))
    if path.suffix == ".json" and path.is_file():
        known = _foreign_columns(_first_keys(path))
        return known or f"this is a JSON file, which is not read as it is; {_TO_METADATA}"
    if path.suffix in _TABLES and path.is_file():
        return f"this is a {path.suffix} file, which is not read as it is; {_TO_METADATA}, or save the table as parquet"
    return ""


def _foreign_folder(path: Path) -> str:
    inside = {child.name.lower(): child for child in path.iterdir()}
    for sides in _FOLDERS:
        if all(side in inside and inside[side].is_dir() for side in sides):
            return (
                f"this is a folder of {sides[0]}/ and {sides[1]}/, which does not say what belongs together; "
                f"{_TO_METADATA}: two images of one name make a pair, its prompt is the caption beside the one in "
                f"{sides[0]}/"
            )
    if any(name.endswith(".tar") for name in inside):
        return _foreign_columns(("__key__",))
    files = (child for name, child in sorted(inside.items()) if name.endswith(".json") and child.is_file())
    return next((known for file in files if (known := _foreign_columns(_first_keys(file)))), "")


def _first_keys(path: Path) -> set[str]:
    with path.open("rb") as file:
        return {key.decode("ascii") for key in _KEY.findall(file.read(_LOOK))}
