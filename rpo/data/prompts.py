"""Where a run from a file takes its prompts: a text file, a .jsonl file, or a source that comes with the package."""

from collections.abc import Mapping
from pathlib import Path

from rpo.errors import InputError
from rpo.files.text import lines, read_text, text_fault
from rpo.files.whole import numbered_lines, parse_line
from rpo.plugins import load_plugin

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
    if not source or not path.is_file() or path.suffix.lower() in TABLES:
        what = f"a {path.suffix} file, whose lines are not prompts" if path.is_file() else "which is no file"
        raise InputError(
            f"prompts is {source!r}, {what}; expected a text file with one prompt per line, a .jsonl file whose lines "
            f'have a "{KEY}", or a name ({", ".join(SOURCES)}); name such a file'
        )
    if path.suffix.lower() == ".jsonl":
        prompts = [_prompt(parse_line(text, name), f"{name} of {path}") for name, text in numbered_lines(path)]
    else:
        prompts = [line.strip() for line in lines(read_text(path)) if line.strip()]
    if not prompts:
        raise InputError(f"{path} has no prompts; give a file with at least one line")
    return prompts


def _prompt(row: Mapping[str, object], name: str) -> str:
    prompt = row.get(KEY)
    if not isinstance(prompt, str):
        raise InputError(f'{name} has no text under "{KEY}" (its keys: {", ".join(row)}); name the column so')
    if fault := text_fault(prompt) or ("" if prompt.strip() else "is empty"):
        raise InputError(f"{name}: the prompt {fault}; expected what an image should show; mend the line")
    return prompt
