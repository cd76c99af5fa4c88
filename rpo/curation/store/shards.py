"""The records of one stage: one file of JSON lines per process, only ever appended to, read as their union.

What is held in memory is where each line is, at 16 bytes a record, and not what it says, so that a run may be of any
length. A half-written last line is cut off in the own part, and passed over in those of others, who may be writing it.
"""

import hashlib
import json
import mmap
import os
import re
import threading
from array import array
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, final

import numpy as np

from rpo.errors import InputError
from rpo.files.text import decode_text
from rpo.files.whole import append_line, mend_last_line, parse_line, written_whole

Row = Mapping[str, object]

OPEN_FILES = 16
"""Parts of one stage that are open for reading at the same time."""

_OFFSET_BITS = 48
_HEXADECIMAL = re.compile(r"[0-9a-f]{16}")
_FEW, _SHARE = 65536, 16  # what came in since is sorted in when it is more than either: so many, this part of all


def key_of(text: str) -> int:
    """64 bits that stand for a text: of the id of a record, which is hexadecimal, its value; else a hash."""
    if _HEXADECIMAL.fullmatch(text):
        return int(text, 16)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


@final
class StageRecords:
    """The union of a stage's parts; with an own part, records can be added."""

    def __init__(self, folder: Path, own_part: int | None = None) -> None:
        """Read where everything is.

        Args:
            own_part: Number of the part that this process appends to, and holds the lock of; None for reading only.
        """
        self.folder = folder
        self._own = None if own_part is None else folder / f"part-{own_part}.jsonl"
        self._lock, self._reading = threading.Lock(), threading.Lock()
        if self._own is not None:
            folder.mkdir(parents=True, exist_ok=True)
            mend_last_line(self._own)
        self._read()

    def _read(self) -> None:
        found = set(self.folder.glob("part-*.jsonl"))
        self._parts: list[Path] = sorted(found if self._own is None else found | {self._own})
        self._file = lru_cache(OPEN_FILES)(self._open)
        keys, places = array("Q"), array("Q")
        for part, path in enumerate(self._parts):
            for start, row in _rows(path):
                keys.append(key_of(str(row["id"])))
                places.append(_place(part, start))
        self._places = Places(keys, places)

    @property
    def has_own(self) -> bool:
        """Whether the own part has records."""
        return self._own is not None and self._own.exists() and self._own.stat().st_size > 0

    def __len__(self) -> int:
        """Number of records."""
        return len(self._places)

    def __contains__(self, record: str) -> bool:
        """Whether the stage is through with a record, be it with a fault."""
        return self._places.get(key_of(record)) is not None

    def __iter__(self) -> Iterator[str]:
        """The ids, in no order that means anything."""
        return (str(row["id"]) for row in self.rows())

    def rows(self) -> Iterator[Row]:
        """All that was recorded, file by file; each file is read once."""
        return (row for _, row in self._placed_rows())

    def newest(self) -> Iterator[Row]:
        """What this process, or one before it with the same part, has recorded, the last first."""
        if self._own is None or not self.has_own:
            return
        with self._own.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            end = len(data)
            while end > 0:
                start = data.rfind(b"\n", 0, end - 1) + 1
                yield json.loads(data[start:end])
                end = start

    def in_order(self, column: str) -> Iterator[Row]:
        """All that was recorded, by the whole number in a column, and by the id where that is the same."""
        numbers, keys, places = array("q"), array("Q"), array("Q")
        for place, row in self._placed_rows():
            numbers.append(int(str(row[column])))
            keys.append(key_of(str(row["id"])))
            places.append(place)
        order = np.lexsort((np.frombuffer(keys, np.uint64), np.frombuffer(numbers, np.int64)))
        return (self._row_at(places[at]) for at in order)

    def __getitem__(self, record: str) -> Row:
        """What was recorded."""
        row = self.get(record)
        if row is None:
            raise KeyError(record)
        return row

    def get(self, record: str) -> Row | None:
        """What was recorded; None if the stage has no such record."""
        place = self._places.get(key_of(record))
        return None if place is None else self._row_at(place)

    def append(self, row: Row) -> None:
        """Record one result; may be called by several threads."""
        if self._own is None:
            raise InputError(f"{self.folder} was opened for reading; expected an own part; give one")
        with self._lock:
            record = _id_of(row, self._own)
            if record in self:
                raise InputError(f"{self.folder} has record {record} already; expected a new one; ask before adding")
            start = self._own.stat().st_size if self._own.exists() else 0
            try:
                append_line(self._own, row)
            except OSError:
                if self._own.exists():
                    os.truncate(self._own, start)  # another thread's line must not continue half of this one
                self._file.cache_clear()  # a buffer may hold the half
                raise
            self._places.add(key_of(record), _place(self._parts.index(self._own), start))

    def forget(self, records: Collection[str]) -> None:
        """Take these records out of the own part, all at once."""
        if self._own is None or not any(row["id"] in records for _, row in _rows(self._own)):
            return
        with written_whole(self._own) as partial:
            partial.touch()
            for _, row in _rows(self._own):
                if row["id"] not in records:
                    append_line(partial, row)
        self._read()

    def _placed_rows(self) -> Iterator[tuple[int, Row]]:
        """Every record with its place; lines that another process has written since are left out."""
        for part, path in enumerate(self._parts):
            for start, row in _rows(path):
                if self._places.get(key_of(str(row["id"]))) == _place(part, start):
                    yield _place(part, start), row

    def _row_at(self, place: int) -> Row:
        with self._reading:
            file = self._file(place >> _OFFSET_BITS)
            file.seek(place & ((1 << _OFFSET_BITS) - 1))
            return json.loads(file.readline())

    def _open(self, part: int) -> BinaryIO:
        return self._parts[part].open("rb")


@final
class Places:
    """Keys to places; of a key that comes again the first place counts. One thread adds, any number look.

    What was known at the start is a sorted array, what comes in a small table that is sorted in now and then.
    """

    def __init__(self, keys: "array[int]", places: "array[int]") -> None:
        """Take what is there."""
        self._known = _sorted(np.frombuffer(keys, np.uint64), np.frombuffer(places, np.uint64))
        self._new: dict[int, int] = {}

    def __len__(self) -> int:
        """Number of records."""
        return len(self._known[0]) + len(self._new)

    def get(self, key: int) -> int | None:
        """The place of a record, if there is one."""
        place = self._new.get(key)  # first: what is sorted in is in both for a moment, and never in neither
        if place is not None:
            return place
        keys, places = self._known
        at = int(np.searchsorted(keys, np.uint64(key)))
        return int(places[at]) if at < len(keys) and int(keys[at]) == key else None

    def add(self, key: int, place: int) -> None:
        """Note a record that is not there yet."""
        self._new[key] = place
        if len(self._new) > max(_FEW, len(self._known[0]) // _SHARE):
            new = (np.fromiter(found, np.uint64, len(self._new)) for found in (self._new, self._new.values()))
            self._known = _sorted(*(np.concatenate(both) for both in zip(self._known, new, strict=True)))
            self._new = {}


def _sorted(keys: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    unique, first = np.unique(keys, return_index=True)
    return unique, places[first]


def _place(part: int, start: int) -> int:
    return part << _OFFSET_BITS | start


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Where each line starts and what it says; a last line that is not whole does not count."""
    if not path.exists():
        return
    start, part = 0, f"{path.parent.name}/{path.name}"
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    row = parse_line(decode_text(line, str(path), first_line=number), f"{part}:{number}")
                except ValueError:
                    if line.endswith(b"\n"):
                        raise
                else:
                    _id_of(row, path)
                    yield start, row
            start += len(line)


def _id_of(row: Row, path: Path) -> str:
    record = row.get("id")
    if not isinstance(record, str):
        raise InputError(
            f"{path.parent.name}/{path.name}: a line has the id {record!r}; expected text; mend or remove the line"
        )
    return record
