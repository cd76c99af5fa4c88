"""Preference sets of other tools: what they are recognised by, and what to do with them.

None is read. Each is named, so that the advice is one that helps, and nothing is trained on that was half understood.
"""

import re
from collections.abc import Collection
from pathlib import Path

_TO_METADATA = "write metadata.jsonl in its folder, a line a pair, with prompt, chosen_file_name and rejected_file_name"
_BY_COLUMNS = (
    (
        "HPDv2",
        {"image_path", "human_preference"},
        "of image_path the one whose human_preference is 1 is chosen",
    ),
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


def foreign_columns(columns: Collection[str]) -> str:
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
        return foreign_columns(("__key__",))
    if path.suffix == ".json" and path.is_file():
        known = foreign_columns(_first_keys(path))
        return known or f"this is a JSON file, which is not read as it is; {_TO_METADATA}"
    if path.suffix in _TABLES and path.is_file():
        return f"this is a {path.suffix} file, which is not read as it is; {_TO_METADATA}, or save the table as parquet"
    return ""


def _foreign_folder(path: Path) -> str:
    inside = {child.name.lower(): child for child in path.iterdir()}
    for chosen, rejected in _FOLDERS:
        if chosen in inside and rejected in inside and inside[chosen].is_dir() and inside[rejected].is_dir():
            return (
                f"this is a folder of {chosen}/ and {rejected}/, which does not say what belongs together; "
                f"{_TO_METADATA}: "
                f"two images of one name make a pair, its prompt is the caption beside the one in {chosen}/"
            )
    if any(name.endswith(".tar") for name in inside):
        return foreign_columns(("__key__",))
    for name, child in sorted(inside.items()):
        if name.endswith(".json") and child.is_file() and (known := foreign_columns(_first_keys(child))):
            return known
    return ""


def _first_keys(path: Path) -> set[str]:
    with path.open("rb") as file:
        return {key.decode("ascii") for key in _KEY.findall(file.read(_LOOK))}
