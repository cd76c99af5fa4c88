"""Where a run from a file takes its prompts: a text file, a .jsonl file, or the embedded world."""

from pathlib import Path
from typing import get_args

from rpo.errors import InputError
from rpo.files import numbered_lines, parse_line
from rpo.shapes.prompts import Split, sample_prompts
from rpo.text import lines, read_text, text_fault

SHAPES = "shapes"
"""The embedded prompts; "shapes:in_domain" and so on are those of another split than "train"."""

SHAPES_COUNT = 512
"""How many of them, with an equal share of each kind; the few of the simple kinds come several times."""

KEY = "prompt"

TABLES = (".csv", ".tsv", ".json", ".yaml", ".yml", ".parquet", ".arrow", ".xlsx", ".md", ".html")
"""Files whose lines are something else than prompts."""


def read_prompts(source: str, *, seed: int) -> list[str]:
    """The prompts that a configuration names.

    Args:
        source: A text file with one prompt per line (blank lines are none), a .jsonl file whose lines have a "prompt",
            or "shapes".
    """
    if source == SHAPES or source.startswith(f"{SHAPES}:"):
        split = source.partition(":")[2] or "train"
        known = {name: name for name in get_args(Split)}
        if split not in known:
            raise InputError(
                f"prompts is {source!r}, but the splits of shapes are {', '.join(known)}; name one of them"
            )
        return [prompt.text for prompt in sample_prompts(known[split], SHAPES_COUNT, seed)]
    path = Path(source)
    if not source or not path.is_file():
        raise InputError(
            f"prompts is {source!r}, but a text file with one prompt per line, a .jsonl file whose lines have a "
            f'"{KEY}", or "{SHAPES}" is needed; give prompts=FILE'
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
