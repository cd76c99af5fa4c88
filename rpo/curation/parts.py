"""The records of one stage: one file of JSON lines per process, only ever appended to, read as their union.

What is held in memory is where each line is, not what it says, so that a run may be of any length. A half-written last
line is cut off in the own part, and passed over in the parts of others, who may be writing it.
"""

import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import final

from rpo.data.jsonl import append_line, mend_last_line, parse_line
from rpo.text import decode_text

Row = Mapping[str, object]


@final
class StageRecords:
    """The union of a stage's parts; with an own part, records can be added."""

    def __init__(self, folder: Path, own_part: int | None = None) -> None:
        """Read where everything is.

        Args:
            folder: Of the stage.
            own_part: Number of the part that this process appends to, and holds the lock of; None for reading only.

        Raises:
            ValueError: A line in the middle of a part is damaged.
        """
        self.folder = folder
        self._own = None if own_part is None else folder / f"part-{own_part}.jsonl"
        self._places: dict[str, tuple[Path, int]] = {}
        self._lock = threading.Lock()
        if self._own is not None:
            folder.mkdir(parents=True, exist_ok=True)
            mend_last_line(self._own)
        self._has_own = self._own is not None and self._own.exists() and self._own.stat().st_size > 0
        for path in sorted(folder.glob("part-*.jsonl")):
            for start, row in _rows(path):
                self._places.setdefault(_record_id(row, path), (path, start))

    @property
    def has_own(self) -> bool:
        """Whether the own part has records."""
        return self._has_own

    def __len__(self) -> int:
        """Number of records."""
        return len(self._places)

    def __contains__(self, record: str) -> bool:
        """Whether the stage is through with a record, be it with a fault."""
        return record in self._places

    def __iter__(self) -> Iterator[str]:
        """The ids, in no order that means anything."""
        return iter(list(self._places))

    def __getitem__(self, record: str) -> Row:
        """What was recorded.

        Raises:
            KeyError: The stage has no such record.
        """
        path, start = self._places[record]
        with path.open("rb") as file:
            file.seek(start)
            return json.loads(file.readline())

    def get(self, record: str) -> Row | None:
        """What was recorded; None if the stage has no such record."""
        return self[record] if record in self._places else None

    def append(self, row: Row) -> None:
        """Record one result; may be called by several threads.

        Args:
            row: With the "id" of its record.

        Raises:
            OSError: The disk is full; the lines before are untouched.
            ValueError: The stage has this record already, or was opened for reading.
        """
        if self._own is None:
            raise ValueError(f"{self.folder} was opened for reading; expected an own part; give one")
        with self._lock:
            record = _record_id(row, self._own)
            if record in self._places:
                raise ValueError(f"{self.folder} has record {record} already; expected a new one; ask before adding")
            start = self._own.stat().st_size if self._own.exists() else 0
            try:
                append_line(self._own, row)
            except OSError:
                if self._own.exists():
                    os.truncate(self._own, start)  # another thread's line must not continue half of this one
                raise
            self._places[record] = (self._own, start)
            self._has_own = True


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Where each line starts and what it says; a last line that is not whole does not count."""
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
        raise ValueError(
            f"{path.parent.name}/{path.name}: a line has the id {record!r}; expected text; mend or remove the line"
        )
    return record
