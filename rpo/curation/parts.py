"""The records of one stage: one file of JSON lines per process, only ever appended to, read as their union.

What is held in memory is where each line is (`rpo.curation.places`), not what it says, so that a run may be of any
length; files stay open between two looks. A half-written last line is cut off in the own part, and passed over in the
parts of others, who may be writing it.
"""

import json
import os
import threading
from array import array
from collections.abc import Iterator, Mapping
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import final

import numpy as np

from rpo.curation.places import Places, key_of, part_and_start, place_of
from rpo.errors import InputError
from rpo.files import append_line, mend_last_line, parse_line
from rpo.text import decode_text

Row = Mapping[str, object]

OPEN_FILES = 16
"""Parts of one stage that are open for reading at the same time."""

_BLOCK = 8192  # bytes read at once; most lines are shorter


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
        self._has_own = self._own is not None and self._own.exists() and self._own.stat().st_size > 0
        found: set[Path] = set(folder.glob("part-*.jsonl"))
        self._parts = sorted(found if self._own is None else found | {self._own})
        self._file = lru_cache(OPEN_FILES)(self._open)
        keys, places = array("Q"), array("Q")
        for part, path in enumerate(self._parts):
            for start, row in _rows(path):
                keys.append(key_of(_record_id(row, path)))
                places.append(place_of(part, start))
        self._places = Places(keys, places)

    @property
    def has_own(self) -> bool:
        """Whether the own part has records."""
        return self._has_own

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
        place = self._places.get(key_of(record))
        if place is None:
            raise KeyError(record)
        return self._row_at(place)

    def get(self, record: str) -> Row | None:
        """What was recorded; None if the stage has no such record."""
        place = self._places.get(key_of(record))
        return None if place is None else self._row_at(place)

    def append(self, row: Row) -> None:
        """Record one result; may be called by several threads."""
        if self._own is None:
            raise InputError(f"{self.folder} was opened for reading; expected an own part; give one")
        with self._lock:
            record = _record_id(row, self._own)
            if record in self:
                raise InputError(f"{self.folder} has record {record} already; expected a new one; ask before adding")
            start = self._own.stat().st_size if self._own.exists() else 0
            try:
                append_line(self._own, row)
            except OSError:
                if self._own.exists():
                    os.truncate(self._own, start)  # another thread's line must not continue half of this one
                raise
            self._places.add(key_of(record), place_of(self._parts.index(self._own), start))
            self._has_own = True

    def _placed_rows(self) -> Iterator[tuple[int, Row]]:
        """Every record with its place; lines that another process has written since are left out."""
        for part, path in enumerate(self._parts):
            for start, row in _rows(path):
                place = place_of(part, start)
                if self._places.get(key_of(_record_id(row, path))) == place:
                    yield place, row

    def _row_at(self, place: int) -> Row:
        part, start = part_and_start(place)
        line = b""
        with self._reading:
            file = self._file(part)
            file.seek(start)
            while not line.endswith(b"\n") and (block := file.read(_BLOCK)):
                line += block.partition(b"\n")[0] + (b"\n" if b"\n" in block else b"")
        return json.loads(line)

    def _open(self, part: int) -> FileIO:
        """Without a buffer, which would keep what was there before a failed line was cut off."""
        return self._parts[part].open("rb", buffering=0)


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Where each line starts and what it says; a last line that is not whole does not count."""
    if not path.exists():
        return
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield (
                        start,
                        parse_line(
                            decode_text(line, str(path), first_line=number), f"{path.parent.name}/{path.name}:{number}"
                        ),
                    )
                except ValueError:
                    if line.endswith(b"\n"):
                        raise
            start += len(line)


def _record_id(row: Row, path: Path) -> str:
    record = row.get("id")
    if not isinstance(record, str):
        raise InputError(
            f"{path.parent.name}/{path.name}: a line has the id {record!r}; expected text; mend or remove the line"
        )
    return record
