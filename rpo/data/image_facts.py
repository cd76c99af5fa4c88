"""What is known of image files, kept in a file: an image that has not changed since is not read again to be known.

A set of a million pairs is hundreds of gigabytes, and each start asks which images they are. What stands for an image
is where it is, how long and when it was last changed; for a cell of a table, the table's own fingerprint.
"""

import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import final

from rpo.data.preference import SIDES, ImageFacts, ImageSource, PairSet, PreferencePair, Side
from rpo.data.tables import Cell

_TABLE = "facts (stamp TEXT PRIMARY KEY, digest TEXT, width INT, height INT)"
_SETTLED_SECONDS = 2.0  # a file that changed just now may change once more within one tick of its date


@final
class FactsFile:
    """Content hashes and sizes of images, by what stands for them."""

    def __init__(self, path: Path) -> None:
        """Name the file; nothing is read or made yet."""
        self._path = path
        self._asked: list[tuple[PreferencePair, Side, str]] = []

    def recall(self, pairs: PairSet) -> None:
        """Tell the records what is known of their images; nothing is written.

        Args:
            pairs: Their images are not read.
        """
        known = self._known()
        for pair, side, stamp in _stamps(pairs):
            if stamp in known:
                pair._facts.setdefault(side, known[stamp])
            else:
                self._asked.append((pair, side, stamp))

    def remember(self) -> None:
        """Keep what the records have learnt of their images since they were asked."""
        rows = [
            (stamp, pair._facts[side].digest, *pair._facts[side].size)
            for pair, side, stamp in self._asked
            if side in pair._facts
        ]
        self._asked.clear()
        if rows:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self._path, timeout=120)) as connection, connection:
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS facts (stamp TEXT PRIMARY KEY, digest TEXT, w INT, h INT)"
                )
                connection.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?, ?, ?)", rows)

    def _known(self) -> dict[str, ImageFacts]:
        if not self._path.is_file():
            return {}
        try:
            with closing(
                sqlite3.connect(f"{self._path.absolute().as_uri()}?mode=ro", timeout=120, uri=True)
            ) as connection:
                rows: Iterable[tuple[str, str, int, int]] = connection.execute("SELECT * FROM facts").fetchall()
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"{self._path} is damaged ({error}); expected a file that rpo wrote; delete it: it will be made again"
            ) from error
        return {stamp: ImageFacts(digest, (width, height)) for stamp, digest, width, height in rows}


def _stamps(pairs: PairSet) -> Iterator[tuple[PreferencePair, Side, str]]:
    for pair in pairs:
        for side in SIDES:
            if stamp := _stamp(pair.chosen if side == "chosen" else pair.rejected):
                yield pair, side, stamp


def _stamp(source: ImageSource) -> str:
    """What stands for an image, or nothing where it has to be read."""
    if isinstance(source, Cell):
        return source.stamp
    if not isinstance(source, str | Path):
        return ""
    try:
        found = os.stat(source)
    except OSError:
        return ""
    changed = max(found.st_mtime, found.st_ctime)
    is_settled = time.time() - changed > _SETTLED_SECONDS
    return f"{os.path.abspath(source)}|{found.st_size}|{found.st_mtime_ns}|{found.st_ctime_ns}" if is_settled else ""
