"""From the columns of somebody's table to a preference record: one function per known form."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from rpo.data.details import DETAIL_COLUMNS
from rpo.data.foreign import foreign_columns
from rpo.data.image_facts import ImageSource
from rpo.data.preference import PreferencePair
from rpo.errors import InputError
from rpo.text import text_fault

Row = Mapping[str, object]
FormName = Literal["native", "files", "pickapic"]


@dataclass(frozen=True)
class Form:
    """The columns by which a form is recognised, and those it can use beside them."""

    text: tuple[str, ...]
    images: tuple[str, str]
    optional: tuple[str, ...]

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
    "native": Form(("prompt",), ("chosen", "rejected"), _OPTIONAL),
    "files": Form(("prompt",), ("chosen_file_name", "rejected_file_name"), _OPTIONAL),
    "pickapic": Form(("caption", "label_0"), ("jpg_0", "jpg_1"), ("has_label", "label_1")),
}


def recognise(columns: Collection[str], origin: str, form: FormName | Literal["auto"] = "auto") -> FormName:
    """Which form a table has.

    Args:
        form: The form that the caller says it has; "auto" looks at the columns.
    """
    candidates: dict[FormName, Form] = FORMS if form == "auto" else {form: FORMS[form]}
    found: list[FormName] = [name for name, candidate in candidates.items() if set(candidate.required) <= set(columns)]
    if len(found) > 1:
        raise InputError(
            f"{origin}: has the columns of {len(found)} forms, {' and '.join(found)}, which may contradict each other; "
            "expected one; remove the columns of the other, or read it with form=…"
        )
    if found:
        return found[0]
    if foreign := foreign_columns(columns):
        raise InputError(f"{origin}: {foreign}")
    expected = " or ".join(f"{', '.join(candidate.required)} ({name})" for name, candidate in candidates.items())
    raise InputError(
        f"{origin}: found the columns {', '.join(sorted(columns)) or '(none)'}; expected {expected}; rename the columns"
    )


def ignored(columns: Iterable[str], form: FormName) -> tuple[str, ...]:
    """The columns that reading this form makes no use of."""
    return tuple(sorted(set(columns) - set(FORMS[form].required) - set(FORMS[form].optional)))


def parse(form: FormName, row: Row, image_of: Callable[[str], ImageSource], *, name: str) -> PreferencePair | Dropped:
    """The record that a row holds, or why it holds none."""
    if form == "pickapic":
        return _parse_pickapic(row, image_of, name)
    images = FORMS[form].images
    return PreferencePair(
        prompt=_text(row, "prompt", name),
        chosen=image_of(images[0]),
        rejected=image_of(images[1]),
        chosen_score=_number(row, "chosen_score", name),
        rejected_score=_number(row, "rejected_score", name),
        source=_text(row, "source", name) if row.get("source") is not None else "",
        seed=_integer(row, "seed", name),
        details=_details(row, name),
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


def _number(row: Row, column: str, name: str) -> float | None:
    value = row.get(column)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{name}: {column} is {value!r}; expected a finite number; mend or remove the record")
    return float(value)


def _integer(row: Row, column: str, name: str) -> int | None:
    value = row.get(column)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{name}: {column} is {value!r}; expected a whole number; mend or remove the record")
    return int(value)


def _details(row: Row, name: str) -> dict[str, str | int | float]:
    details: dict[str, str | int | float] = {}
    for column in DETAIL_COLUMNS:
        value = row.get(column)
        if value is None:
            continue
        if not isinstance(value, str | int | float):
            raise InputError(f"{name}: {column} is {value!r}; expected text or a number; mend or remove the record")
        details[column] = value
    return details
