"""Where a run from a file takes its prompts: a text file, a .jsonl file, or a source that comes with the package."""

from pathlib import Path

from rpo.errors import InputError
from rpo.files import numbered_lines, parse_line
from rpo.plugins import load_plugin
from rpo.text import lines, read_text, text_fault

SOURCES = {"shapes": "rpo.shapes.prompts:texts"}
"""Prompts by name: what makes texts of the part behind a colon, as in "shapes:in_domain", and of a seed."""

HELD_OUT = {"shapes": "rpo.shapes.prompts:held_out_texts"}
"""Those that no training sees: what makes texts by domain of a number for each and of a seed."""

KEY = "prompt"

TABLES = (".csv", ".tsv", ".json", ".yaml", ".yml", ".parquet", ".arrow", ".xlsx", ".md", ".html")
"""Files whose lines are something else than prompts."""


def read_prompts(source: str, *, seed: int) -> list[str]:
    """The prompts that a configuration names.

    Args:
        source: A text file with one prompt per line (blank lines are none), a .jsonl file whose lines have a "prompt",
            or a name of `SOURCES`, with or without one of its parts ("shapes:in_domain").
    """
    name, _, part = source.partition(":")
    if name in SOURCES:
        return load_plugin(name, SOURCES, "source of prompts")(part, seed)
    path = Path(source)
    if not source or not path.is_file():
        raise InputError(
            f"prompts is {source!r}, but a text file with one prompt per line, a .jsonl file whose lines have a "
            f'"{KEY}", or a name ({", ".join(SOURCES)}) is needed; give prompts=FILE'
        )
    if path.suffix.lower() in TABLES:
        raise InputError(
            f"prompts is {source!r}, a {path.suffix} file, whose lines are not prompts; expected a text file with one "
            f'prompt per line, or a .jsonl file whose lines have a "{KEY}"; write it so'
        )
    prompts = _from_jsonl(path) if path.suffix.lower() == ".jsonl" else _from_text(path)
    if not prompts:
        raise InputError(f"{path} has no prompts; give a file with at least one line")
    return prompts


def _from_text(path: Path) -> list[str]:
    return [line.strip() for line in lines(read_text(path)) if line.strip()]  # blank lines separate, and are no prompts


def _from_jsonl(path: Path) -> list[str]:
    prompts = []
    for name, text in numbered_lines(path):
        row = parse_line(text, name)
        prompt = row.get(KEY)
        if not isinstance(prompt, str):
            raise InputError(
                f'{name} of {path} has no text under "{KEY}" (its keys: {", ".join(row)}); name the column so'
            )
        if fault := text_fault(prompt) or ("" if prompt.strip() else "is empty"):
            raise InputError(f"{name} of {path}: the prompt {fault}; expected what an image should show; mend the line")
        prompts.append(prompt)
    return prompts
