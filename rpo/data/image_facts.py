"""What is known of images, kept in a file of the user: an image that has not changed is not read again to be known.

A set of a million pairs is hundreds of gigabytes, and each start asks which images they are. What stands for a file is
where it is, its inode, how long it is and when it was last changed; for a cell of a table, the table's own fingerprint.
The file takes about 100 bytes an image and may be deleted at any time.
"""

import hashlib
import os
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import closing
from dataclasses import dataclass
from functools import singledispatch
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from huggingface_hub.constants import HF_HOME

from rpo.data.own_files import read_regular
from rpo.data.pixels import upright_size
from rpo.errors import InputError

T = TypeVar("T")

ImageSource = str | Path | bytes | Callable[[], bytes]
"""An encoded image: a file, its bytes, or a function that reads its bytes from where they are."""


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What is known of an image without decoding it."""

    digest: str
    """sha256 of the encoded bytes."""
    size: tuple[int, int]
    """Upright (width, height) in pixels."""


Place: TypeAlias = tuple[MutableMapping[Any, ImageFacts], str, ImageSource]
"""Where the facts of an image belong, under which name, and the image."""

FILE = "rpo_images.sqlite"
"""Its name, in the folder where `datasets` keeps what it converts."""

SETTLED_SECONDS = 2.0
"""Age from which the times of a file tell whether it was changed: before, it may change once more within one tick."""

_AT_ONCE = 400  # items, of at most two images each: SQLite's oldest limit on variables is 999


def recalled(items: Iterable[T], places: Callable[[T], Iterable[Place]]) -> Iterator[T]:
    """Items in order, each told what is known of its images; what is learnt of them on the way is kept."""
    remaining = iter(items)
    while some := list(islice(remaining, _AT_ONCE)):
        unknown = (place for item in some for place in places(item) if place[1] not in place[0])
        stamped = ((facts, name, stamp_of(source)) for facts, name, source in unknown)
        asked = [(facts, name, hashlib.sha256(stamp.encode()).digest()[:20]) for facts, name, stamp in stamped if stamp]
        known = _known({key for _, _, key in asked})
        for facts, name, key in asked:
            if key in known:
                facts[name] = known[key]
        try:
            yield from some
        finally:
            _keep({key: facts[name] for facts, name, key in asked if key not in known and name in facts})


def read_image(source: ImageSource, name: str) -> bytes:
    """The encoded bytes of an image."""
    try:
        if isinstance(source, str | Path):
            return read_regular(source)
        return source if isinstance(source, bytes) else source()
    except (OSError, ValueError) as error:
        is_gone = isinstance(error, FileNotFoundError) and isinstance(source, str | Path)
        fault = "does not exist" if is_gone else f"cannot be read ({error})"
        raise InputError(f"{name} {fault}; expected a readable image file; restore it or remove the record") from error


def facts_of(data: bytes, name: str) -> ImageFacts:
    """What there is to know of an encoded image without decoding it."""
    return ImageFacts(digest_of(data), upright_size(data, name))


def digest_of(data: bytes) -> str:
    """What identifies encoded bytes."""
    return hashlib.sha256(data).hexdigest()


@singledispatch
def stamp_of(source: object) -> str:
    """What stands for an image as long as it does not change; empty for one that has to be read."""
    return ""


@stamp_of.register(str)
@stamp_of.register(Path)
def _(source: str | Path) -> str:
    try:
        found = os.stat(source)
    except OSError:
        return ""  # told by whoever reads it
    if time.time() - max(found.st_mtime, found.st_ctime) <= SETTLED_SECONDS:
        return ""
    return f"{os.path.abspath(source)}|{found.st_ino}|{found.st_size}|{found.st_mtime_ns}|{found.st_ctime_ns}"


def facts_file() -> Path:
    """Where the file is: beside what `datasets` keeps."""
    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets").expanduser() / FILE


def _known(keys: set[bytes]) -> dict[bytes, ImageFacts]:
    if not keys or not facts_file().is_file():
        return {}
    query = f"SELECT * FROM facts WHERE key IN ({','.join('?' * len(keys))})"
    rows = _run(lambda connection: connection.execute(query, list(keys)).fetchall(), "rw") or ()
    return {key: ImageFacts(digest.hex(), (width, height)) for key, digest, width, height in rows}


def _keep(fresh: dict[bytes, ImageFacts]) -> None:
    rows = [(key, bytes.fromhex(facts.digest), *facts.size) for key, facts in fresh.items()]

    def insert(connection: sqlite3.Connection) -> None:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS facts (key BLOB PRIMARY KEY, digest BLOB, w INT, h INT) WITHOUT ROWID"
        )
        connection.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?, ?, ?)", rows)

    if rows:
        _run(insert, "rwc")


def _run(do: Callable[[sqlite3.Connection], T], mode: str) -> T | None:
    """Do it in one transaction; a file that cannot be used costs time alone, and is told."""
    path = facts_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        uri = f"{path.absolute().as_uri()}?mode={mode}"
        with closing(sqlite3.connect(uri, timeout=120, uri=True)) as connection, connection:
            return do(connection)
    except (OSError, sqlite3.OperationalError) as error:
        warnings.warn(
            f"{path} cannot be used ({error}), so every start reads all images; expected a folder that can be written; "
            "name one in HF_DATASETS_CACHE",
            stacklevel=2,
        )
    except sqlite3.DatabaseError as error:
        raise InputError(f"{path} is damaged ({error}); expected a file that rpo wrote; delete it") from error
    return None
