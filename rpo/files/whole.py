"""Files that a kill or a full disk leaves whole: replaced in one move, or lines that are only ever appended to.

A killed writer of lines costs at most the line it was writing.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rpo.errors import InputError
from rpo.files.partial import partial_of
from rpo.files.text import read_lines_of, text_fault, write_text

_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # of a surrogate pair, which JSON can write alone


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file to write to that takes the place of `path` once it is written, and is gone if that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise name_full_disk(error, path) from error
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with written_whole(path) as partial:
        write_text(partial, text)


def replace_folder(draft: Path, folder: Path) -> None:
    """Put a finished folder in the place of another, which is gone only once the new one is there."""
    previous = folder.with_name(folder.name + ".previous")
    shutil.rmtree(previous, ignore_errors=True)
    if folder.exists():
        os.replace(folder, previous)
    os.replace(draft, folder)
    shutil.rmtree(previous, ignore_errors=True)


def append_line(path: Path, row: Mapping[str, object]) -> None:
    """Append one object as a line, in a single write."""
    line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
    try:
        with path.open("ab", buffering=0) as file:
            if file.write(line) != len(line):  # a nearly full disk takes a part without an error
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise name_full_disk(error, path) from error


def parse_line(text: str, name: str) -> dict[str, object]:
    """The object that one line holds."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: not JSON ({error}); expected one object a line; mend or remove the line") from error
    if not isinstance(row, dict):
        raise InputError(f"{name}: a JSON {type(row).__name__}; expected one object a line; mend or remove the line")
    if _HALF.search(text) and (fault := text_fault(json.dumps(row, ensure_ascii=False))):
        raise InputError(f"{name}: a text of it {fault}; expected plain text; mend or remove the line")
    return row


def numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Name ("metadata.jsonl:17") and text of every line that is not blank; none if there is no file."""
    if not path.exists():
        return
    for number, text in read_lines_of(path):
        if text.strip():
            yield f"{path.name}:{number}", text


def read_lines(path: Path) -> Iterator[dict[str, object]]:
    """The objects of a file; none if there is no file."""
    for name, text in numbered_lines(path):
        yield parse_line(text, name)


def mend_last_line(path: Path) -> None:
    """Make a file ready for appending: cut off a half-written last line, and end a whole one that has no line end.

    A last line counts as half-written when it is not JSON and no line end follows it.
    """
    if not path.exists():
        return
    data = path.read_bytes()
    start = data.rfind(b"\n") + 1
    if start == len(data):
        return
    try:
        json.loads(data[start:])
    except ValueError:
        os.truncate(path, start)
    else:
        with path.open("ab") as file:
            file.write(b"\n")


def name_full_disk(error: OSError, path: Path) -> OSError:
    """The error to raise instead: for a full disk, one that names the file, the free space and the remedy."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    free_mib = shutil.disk_usage(path.parent).free / 2**20
    message = f"no space left for {path} ({free_mib:.1f} MiB free); free some and run again: what was stored is kept"
    return OSError(errno.ENOSPC, message)
