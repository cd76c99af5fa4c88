"""From the columns of somebody's table to a preference record: one function per known form.

A set of another form is named where it is known, so that the advice is one that helps, and nothing is trained on that
was half understood.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from rpo.data.image_facts import ImageSource
from rpo.data.preference import PreferencePair
from rpo.errors import InputError
from rpo.files.text import text_fault

Row = Mapping[str, object]
FormName = Literal["native", "files", "pickapic", "rapidata", "rapidata_weighted", "hpdv3"]
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
    "rapidata": Form(("prompt", "votes_image1", "votes_image2"), ("image1", "image2"), ()),
    "rapidata_weighted": Form(
        ("prompt", "weighted_results_image1_preference", "weighted_results_image2_preference"),
        ("image1", "image2"),
        (),
    ),
    "hpdv3": Form(("prompt",), ("path1", "path2"), ()),
}
"""By name; of HPDv3 the first image is the preferred one, of Rapidata's the one with more votes."""

_NOT_TEXT = ("prompt", "caption", "source", "key", "has_label")
NUMERIC = {
    *NUMBERS,
    *{column for form in FORMS.values() for column in form.text + form.optional} - {*_NOT_TEXT, *DETAIL_COLUMNS},
}
"""Columns of numbers."""


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
    if form.startswith("rapidata"):
        return _parse_votes(form, row, image_of, name)
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
    label, has_label = _number(row, "label_0", name), row.get("has_label")
    if has_label not in (None, True, False):
        raise InputError(f"{name}: has_label is {has_label!r}; expected true or false; mend or remove the row")
    if label is None or has_label in (False, 0):
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


def _parse_votes(
    form: FormName, row: Row, image_of: Callable[[str], ImageSource], name: str
) -> PreferencePair | Dropped:
    (prompt, *columns), images = FORMS[form].text, FORMS[form].images
    first, second = votes = [_number(row, column, name) for column in columns]
    if None in votes or first == second:
        return Dropped("unlabelled" if None in votes else "tie")
    (less, rejected), (more, chosen) = sorted(zip(votes, images, strict=True))
    return PreferencePair(
        _text(row, prompt, name), image_of(chosen), image_of(rejected), more, less, source="rapidata", name=name
    )


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
    ("HPDv2", {"image_path", "human_preference"}, f"{_TO_METADATA}: the chosen image has human_preference 1"),
    ("HPDv2 (ranked)", {"image_path", "rank"}, f"{_TO_METADATA}: of two images the chosen one has the lower rank"),
    ("InvokeAI", {"image_0", "image_1", "prefer_0", "prefer_1"}, f"{_TO_METADATA}: the chosen image's prefer_ is true"),
    ("WebDataset", {"__key__"}, "download its tar files, and give their folder"),
)
"""Name of the tool or set, columns that give it away, and what to do with it."""


def _foreign_columns(columns: Collection[str]) -> str:
    """What a table with these columns is and what to do with it; empty for one that nobody knows."""
    for name, marks, advice in _BY_COLUMNS:
        if marks <= set(columns):
            return f"this is a set of {name}, which is not read as it is; {advice}"
    return ""
