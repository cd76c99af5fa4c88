"""Rows of pairs as they lie on this disk: lines of JSON, a table of text, shards of tar files, two folders of images.

A row has the name by which a person finds it ("metadata.jsonl:17") and is read when it is asked for, so that a broken
one is one fault and no more. What its columns say of images are names of files in the set's folder, or what reads them.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rpo.data.columns import NUMERIC
from rpo.data.image_facts import ImageSource
from rpo.data.image_folders import paired_images, sides_in
from rpo.data.own_files import is_hidden, own_file
from rpo.data.tar_shards import TarMember, tar_rows
from rpo.data.writers import METADATA
from rpo.errors import InputError
from rpo.files.text import read_text
from rpo.files.whole import numbered_lines, parse_line

Row = Mapping[str, object]
NamedRow = tuple[str, Callable[[], Row]]
"""A row's name, and what reads it or raises an `InputError` that begins with the name."""

ONLY_SPLIT = "train"
"""What the one split of a file or folder is called that has no others."""

_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")


@dataclass(frozen=True)
class RowFiles:
    """The rows of files or folders of one kind."""

    origin: Path
    folder: Path
    """What the names of images are relative to."""
    rows: Iterator[NamedRow]

    def image_of(self, row: Row, name: str, column: str) -> ImageSource:
        """The image that a column of a row stands for."""
        value = row[column]
        if isinstance(value, Path | TarMember):
            return value
        if not isinstance(value, str) or not value:
            raise InputError(f"{name}: {column} is {value!r}; expected a file name; mend or remove the record")
        try:
            return own_file(self.folder, value)
        except ValueError as error:
            raise InputError(f"{name}: {column} {error}") from error


def open_rows(path: Path, split: str) -> RowFiles | None:
    """The rows of a file, or of the files of a split in a folder; None for what only `datasets` can open."""
    return _of_folder(path, split) if path.is_dir() else _of_file(path, split)


def _of_file(path: Path, split: str) -> RowFiles | None:
    suffix = path.suffix.lower()
    if path.name.lower().endswith((".tar.gz", ".tgz")) and path.is_file():
        raise InputError(f"{path} is compressed, so that no image can be found in it by its place; gunzip it")
    if suffix not in _READERS or not path.is_file():
        return None
    require_split(path, split, ONLY_SPLIT)
    return RowFiles(path, path.parent, _READERS[suffix](path))


def _of_folder(path: Path, split: str) -> RowFiles | None:
    if tables := [name for name in (METADATA, "metadata.csv") if (path / name).is_file()]:
        return _of_file(path / _only(path, tables), split)
    files: dict[str, list[Path]] = {".parquet": [], ".tar": [], ".jsonl": []}
    for file in sorted(path.iterdir()):
        if file.suffix.lower() in files and not is_hidden(file.name) and file.is_file():
            files[file.suffix.lower()].append(file)
    if files.pop(".parquet"):
        return None
    sides, listed = sides_in(path), path / f"{split}.json"
    found = [suffix for suffix, some in files.items() if some] + [f"{one}/" for one in (sides or ())[:1]]
    kind = _only(path, [*found, listed.name] if listed.is_file() else found)
    if kind in files:
        some = _of_split(path, files[kind], split)
        return RowFiles(path, path, (row for file in some for row in _READERS[kind](file)))
    if sides:
        require_split(path, split, ONLY_SPLIT)
        return RowFiles(path, path, paired_images(path, sides))
    return RowFiles(path, path, _json_rows(listed)) if kind else None


def _only(folder: Path, found: Sequence[str]) -> str:
    """The one way in which a folder holds pairs, if there is one."""
    if len(found) > 1:
        raise InputError(
            f"{folder}: holds pairs in {len(found)} ways, {' and '.join(found)}, which may contradict each other; "
            "expected one; move the others away, or give the file that counts"
        )
    return found[0] if found else ""


def lines_of(path: Path) -> RowFiles:
    """The lines of a .jsonl file, none if there is no file."""
    return RowFiles(path, path.parent, _lines(path))


def require_split(source: object, split: str, *known: str) -> None:
    """Refuse a split that a source does not have: reading another would train on what should be held out."""
    if split not in known:
        raise InputError(
            f"{source}: there is no split {split!r}; expected one of {', '.join(dict.fromkeys(known))}; name one"
        )


def _of_split(folder: Path, files: Sequence[Path], split: str) -> list[Path]:
    """The files of a split, which begin with its name; those that begin with the name of none are of the only one."""
    splits = {file: next((one for one in _SPLITS if _begins(file.stem, one)), ONLY_SPLIT) for file in files}
    if files:
        require_split(folder, split, *splits.values())
    return [file for file, found in splits.items() if found == split]


def _begins(name: str, word: str) -> bool:
    return name.startswith(word) and not name[len(word) :][:1].isalpha()


def _lines(path: Path) -> Iterator[NamedRow]:
    for name, text in numbered_lines(path):
        yield name, partial(parse_line, text, name)


def _csv_rows(path: Path) -> Iterator[NamedRow]:
    table = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    name = path.name
    try:
        if twice := [column for column, count in Counter(table.fieldnames or ()).items() if count > 1 and column]:
            raise InputError(
                f"{path}: has the column {twice[0]} twice; expected one of each name; rename or remove one"
            )
        for cells in table:
            yield (name := f"{path.name}:{table.line_num}"), partial(_plain, cells, name)
    except csv.Error as error:
        raise InputError(f"{path}, after {name}: no CSV ({error}); expected cells apart by commas; mend it") from error


def _plain(cells: Mapping[str | None, str | None], name: str) -> Row:
    """The cells; numbers as such, for a CSV has text alone, and what is empty as nothing, or as an empty caption."""
    if None in cells:
        raise InputError(f"{name}: has more cells than the header names; expected as many; put quotes around commas")
    return {column: _value(column, text) for column, text in cells.items() if column}


def _value(column: str, text: str | None) -> object:
    if not text:
        return text if column in ("prompt", "caption") else None
    if column == "has_label":
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    try:
        return text if column not in NUMERIC else int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        return text  # told by whoever needs a number


def _json_rows(path: Path) -> Iterator[NamedRow]:
    try:
        rows = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); expected a list of objects; mend it") from error
    if not isinstance(rows, list):
        raise InputError(f"{path}: a JSON {type(rows).__name__}; expected a list of objects, a pair each; write one")
    for number, row in enumerate(rows):
        yield (name := f"{path.name}[{number}]"), partial(_object, row, name)


def _object(row: object, name: str) -> Row:
    if not isinstance(row, dict):
        raise InputError(f"{name}: a JSON {type(row).__name__}; expected an object; mend or remove it")
    return row


_READERS: Mapping[str, Callable[[Path], Iterator[NamedRow]]] = {
    ".jsonl": _lines,
    ".csv": _csv_rows,
    ".json": _json_rows,
    ".tar": tar_rows,
}
