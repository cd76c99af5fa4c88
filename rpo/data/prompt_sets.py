"""Sets of prompts to evaluate on, each prompt with its category: our own, and the files that others evaluate on.

    general                  64 prompts without people, eight of each of eight categories, in the package
    shapes, words            both held-out domains of the shapes world, or of the words world
    FILE                     one prompt per line; or .jsonl with a "prompt" and, if all have one, a "category"
    parti:FILE               PartiPrompts (arXiv:2206.10789): a table with tabs; Prompt, Category, Challenge
    drawbench:FILE           DrawBench (arXiv:2205.11487): a table with commas; Prompts, Category
    geneval:FILE             GenEval (arXiv:2310.11513): JSON lines; what it asks for goes to the reward as metadata
    t2i-compbench:FOLDER     T2I-CompBench (arXiv:2307.06350): NAME_val.txt for each category, or one such file
    hpd:FOLDER               HPDv2 (arXiv:2306.09341): STYLE.json for each style, a list of texts, or one such file

A file that is not what it is said to be is refused, with the line where it begins to be something else.
"""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpo.data.prompts import HELD_OUT, KEY, AnnotatedPrompt, metadata_of, read_prompts
from rpo.errors import InputError
from rpo.files.text import lines, read_text, text_fault
from rpo.files.whole import numbered_lines, parse_line
from rpo.plugins import load_plugin

OWN = {"general": Path(__file__).parent / "own_prompts" / "general.jsonl"}
"""Those that come with the package."""

DRAWN = 100
"""Prompts of each domain, of a set that is drawn, when nobody says how many."""

CATEGORY = "category"


@dataclass(frozen=True)
class PromptSet:
    """Prompts, each with its category, in the order of which their noise depends."""

    source: str
    prompts: tuple[str, ...]
    categories: tuple[str, ...]

    @property
    def listed(self) -> list[dict[str, Any]]:
        """All that is known of each, as JSON has it."""
        return [
            {KEY: str(prompt), CATEGORY: category} | ({"metadata": known} if (known := metadata_of(prompt)) else {})
            for prompt, category in zip(self.prompts, self.categories, strict=True)
        ]

    @property
    def sha256(self) -> str:
        """Of that list."""
        return hashlib.sha256(json.dumps(self.listed, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def read_prompt_set(source: str, *, count: int | None = None, categories: Sequence[str] = ()) -> PromptSet:
    """The prompts that a person names.

    Args:
        source: See above.
        count: Of each category the first so many; nothing is all, or `DRAWN` of a set that is drawn.
        categories: Those that are taken; nothing is all.
    """
    form, _, path = source.partition(":")
    if form in FORMS and path:
        found = list(FORMS[form](Path(path)))
    elif source in HELD_OUT:
        domains = load_plugin(source, HELD_OUT, "set of held-out prompts")(count or DRAWN, 0)
        found = [(prompt, domain) for domain, prompts in domains.items() for prompt in prompts]
    else:
        found = _plain(str(OWN.get(source, source)), source)
    if not found:
        raise InputError(f"{path or source} has no prompts; give a file with at least one")
    names = list(dict.fromkeys(category for _, category in found))
    if strange := [one for one in categories if one not in names]:
        raise InputError(
            f"{source} has no category {strange[0]!r}; its categories are {', '.join(names)}; name of these"
        )
    taken, kept = dict[str, int](), list[tuple[str, str]]()
    for prompt, category in found:
        taken[category] = taken.get(category, 0) + 1
        if (count is None or taken[category] <= count) and category in (categories or names):
            kept.append((prompt, category))
    return PromptSet(source, tuple(prompt for prompt, _ in kept), tuple(category for _, category in kept))


def _plain(file: str, source: str) -> list[tuple[str, str]]:
    """The prompts of a file or source of `read_prompts`; of lines with a category, those of it."""
    try:
        prompts = read_prompts(file, seed=0)
    except InputError as error:
        known = ", ".join([*OWN, *HELD_OUT, *(f"{form}:PATH" for form in FORMS)])
        raise InputError(f"{error}. Sets to evaluate on are also {known}") from error
    named = [known.get(CATEGORY) if isinstance(known := metadata_of(prompt), dict) else None for prompt in prompts]
    if any(named):
        if wrong := [number for number, one in enumerate(named, 1) if not isinstance(one, str) or not one]:
            raise InputError(
                f"{source}: prompt {wrong[0]} has no text under {CATEGORY!r}, but others have; expected one for each, "
                "or none; give it"
            )
        return [(_without_category(prompt), str(category)) for prompt, category in zip(prompts, named, strict=True)]
    return [(prompt, Path(file).stem) for prompt in prompts]


def _without_category(prompt: str) -> str:
    known = {name: value for name, value in metadata_of(prompt).items() if name != CATEGORY}
    return AnnotatedPrompt(prompt, known) if known else str(prompt)


def _parti(file: Path) -> Iterator[tuple[str, str]]:
    names = ("Prompt", "Category", "Challenge")
    rows = ((number, line.split("\t")) for number, line in enumerate(lines(_text_of(file)), 1))
    for number, (prompt, category, challenge) in _columns(file, rows, names):
        yield AnnotatedPrompt(_checked(prompt, file, number), {"challenge": challenge}), category


def _drawbench(file: Path) -> Iterator[tuple[str, str]]:
    reader = csv.reader(io.StringIO(_text_of(file), newline=""), strict=True)

    def rows() -> Iterator[tuple[int, list[str]]]:
        try:
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise _fault(
                file, reader.line_num, f"no row of a table with commas ({error})", "close its quotes"
            ) from None

    for number, (prompt, category) in _columns(file, rows(), ("Prompts", "Category")):
        yield _checked(prompt, file, number), category


def _columns(
    file: Path, rows: Iterator[tuple[int, list[str]]], names: tuple[str, ...]
) -> Iterator[tuple[int, list[str]]]:
    """The number of each row that is not blank, and of it what is under these names."""
    number, header = next(rows, (1, []))
    if missing := [name for name in names if name not in header]:
        told = f"no column {missing[0]} in the header {', '.join(header)!r}"
        raise _fault(file, number, told, f"expected {', '.join(names)}")
    places = [header.index(name) for name in names]
    for number, row in rows:
        if not any(cell.strip() for cell in row):
            continue
        found = [row[place].strip() if place < len(row) else "" for place in places]
        if len(row) > len(header) or not all(found):
            told = f"{len(row)} columns, and not one text each for {', '.join(names)}"
            raise _fault(file, number, told, f"expected {len(header)} columns as in the header")
        yield number, found


def _geneval(file: Path) -> Iterator[tuple[str, str]]:
    _text_of(file)
    for name, text in numbered_lines(file):
        number, row = int(name.rpartition(":")[2]), parse_line(text, name)
        tag, include = row.get("tag"), row.get("include")
        is_asked = isinstance(include, list) and all(isinstance(one, dict) and "class" in one for one in include)
        if not isinstance(tag, str) or not isinstance(row.get(KEY), str) or not is_asked or not include:
            raise _fault(
                file, number, "no line of GenEval", 'expected "tag", "include" (a list with "class"), "prompt"'
            )
        known = {key: value for key, value in row.items() if key != KEY}
        yield AnnotatedPrompt(_checked(str(row[KEY]), file, number), known), tag


def _compbench(path: Path) -> Iterator[tuple[str, str]]:
    for file in _files(path, "*_val.txt"):
        for number, line in enumerate(lines(_text_of(file)), 1):
            if line.strip():
                yield _checked(line, file, number), file.stem.removesuffix("_val")


def _hpd(path: Path) -> Iterator[tuple[str, str]]:
    for file in _files(path, "*.json"):
        text = _text_of(file)
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise _fault(file, error.lineno, f"no JSON ({error.msg})", "expected a list of texts") from error
        if not isinstance(found, list):
            raise _fault(file, 1, f"a JSON {type(found).__name__}", 'expected a list of texts, ["…", "…"]')
        for number, one in enumerate(found, 1):
            if not isinstance(one, str):
                raise InputError(f"{file}, entry {number}: {one!r} is no text; expected a list of texts; mend it")
            yield _checked(one, file, number, "entry"), file.stem


FORMS: dict[str, Callable[[Path], Iterator[tuple[str, str]]]] = {
    "parti": _parti,
    "drawbench": _drawbench,
    "geneval": _geneval,
    "t2i-compbench": _compbench,
    "hpd": _hpd,
}
"""What reads a set of others, by what a person calls it."""


def _files(path: Path, pattern: str) -> list[Path]:
    found = sorted(path.glob(pattern)) if path.is_dir() else [path]
    if not found:
        raise InputError(f"{path} has no {pattern}; expected such a file for each category; give the folder with them")
    return found


def _text_of(file: Path) -> str:
    if not file.is_file():
        raise InputError(f"there is no file {file}; expected one of prompts; give its path")
    return read_text(file)


def _checked(prompt: str, file: Path, number: int, what: str = "line") -> str:
    if fault := text_fault(prompt) or ("" if prompt.strip() else "is empty"):
        raise _fault(file, number, f"the prompt {fault}", "expected what an image should show", what)
    return prompt.strip()


def _fault(file: Path, number: int, given: str, expected: str, what: str = "line") -> InputError:
    return InputError(f"{file}, {what} {number}: {given}; {expected}; mend it, or give the file in its usual form")
