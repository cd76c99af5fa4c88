"""Prompts, with or without what else is known of them, and where a run from a file takes its own.

A run from a file reads a text file, a .jsonl file, or a source that comes with the package.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rpo.errors import InputError
from rpo.files.text import lines, read_text, text_fault
from rpo.files.whole import numbered_lines, parse_line
from rpo.plugins import load_plugin

SOURCES = {"shapes": "rpo.shapes.prompts:texts", "words": "rpo.words.prompts:texts"}
"""Prompts by name: what makes texts of the part behind a colon, as in "shapes:in_domain", and of a seed."""

HELD_OUT = {"shapes": "rpo.shapes.prompts:held_out_texts", "words": "rpo.words.prompts:held_out_texts"}
"""Those that no training sees: what makes texts by domain of a number for each and of a seed."""

KEY = "prompt"

TABLES = (".csv", ".tsv", ".json", ".yaml", ".yml", ".parquet", ".arrow", ".xlsx", ".md", ".html")
"""Files whose lines are something else than prompts."""


class AnnotatedPrompt(str):
    """A prompt that carries what else is known of it, such as the answer that a reward looks for.

    It is a text to all that takes texts, so that the rest travels with it to the rewards. The text may be empty, for
    images of no prompt.

    Example:
        >>> prompt = AnnotatedPrompt("three cats", {"count": 3})
        >>> prompt == "three cats", metadata_of(prompt), metadata_of("a dog")
        (True, {'count': 3}, {})
    """

    metadata: Any

    def __new__(cls, text: str, metadata: Any = None) -> "AnnotatedPrompt":
        """Take the text and its metadata, which is kept as JSON gives it back (tuples as lists); {} by default."""
        made = super().__new__(cls, text)
        try:
            made.metadata = {} if metadata is None else json.loads(json.dumps(metadata, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"the metadata of the prompt {text!r} cannot be written as JSON ({error}); expected texts, numbers, "
                "lists and dicts; give files by their path and arrays as lists"
            ) from error
        return made


def metadata_of(prompt: str) -> Any:
    """What else is known of a prompt; {} if nothing."""
    return prompt.metadata if isinstance(prompt, AnnotatedPrompt) else {}


def caption_of(prompt: str) -> str:
    """A prompt with all that is known of it, as a person reads it beside an image."""
    known = metadata_of(prompt)
    return (str(prompt) or "(no prompt)") + (f"  {json.dumps(known, ensure_ascii=False)}" if known else "")


def as_prompt(given: object, name: str) -> str:
    """One prompt as a caller has it: a text, (text, metadata), or a row with a "prompt" and more."""
    if isinstance(given, Mapping):
        return _of_row(given, name)
    pair = given if isinstance(given, tuple) and len(given) == 2 else (given, None)  # noqa: PLR2004 - a pair
    text, metadata = pair
    if not isinstance(text, str):
        raise InputError(
            f"{name} is {given!r}; expected a text, (text, metadata), or a row with a text under {KEY!r}; make it one"
        )
    if fault := text_fault(text):
        raise InputError(f"{name} {fault}, but plain text is needed; mend it")
    is_meant = text == "" and (isinstance(text, AnnotatedPrompt) or pair is given)
    if not text.strip() and not is_meant:
        raise InputError(
            f"{name} is {text!r}, but a text that is not empty is needed; remove it, or give AnnotatedPrompt('') "
            "if an image of no prompt is meant"
        )
    return AnnotatedPrompt(text, metadata) if pair is given else text


def read_prompts(source: str, *, seed: int) -> list[str]:
    """The prompts that a configuration names.

    Args:
        source: A text file with one prompt per line (blank lines are none), a .jsonl file whose lines have a "prompt"
            and whatever else is known of it, or a name of `SOURCES`, with or without one of its parts
            ("shapes:in_domain").
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
        prompts = [_of_row(parse_line(text, name), f"{name} of {path}") for name, text in numbered_lines(path)]
    else:
        prompts = [line.strip() for line in lines(read_text(path)) if line.strip()]
    if not prompts:
        raise InputError(f"{path} has no prompts; give a file with at least one line")
    return prompts


def _of_row(row: Mapping[Any, Any], name: str) -> str:
    prompt = row.get(KEY)
    if not isinstance(prompt, str):
        raise InputError(f'{name} has no text under "{KEY}" (its keys: {", ".join(map(str, row))}); name the column so')
    if fault := text_fault(prompt) or ("" if prompt.strip() else "is empty"):
        raise InputError(f"{name}: the prompt {fault}; expected what an image should show; mend the line")
    known = {key: value for key, value in row.items() if key != KEY}
    return AnnotatedPrompt(prompt, known) if known else prompt
