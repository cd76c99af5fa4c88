"""The sha256 of image files, remembered beside a run, so that a start does not read every image of its source again.

A file counts as the one that was read as long as its inode, size and times are the same. One that was changed a moment
ago is read again the next time: it may be changed once more within one tick of the clock of the file system.
"""

import hashlib
import os
import time
from pathlib import Path
from typing import final

from rpo.data.jsonl import append_line, mend_last_line, read_lines

SETTLED_SECONDS = 2.0
"""Age from which the times of a file tell whether it was changed."""


@final
class Digests:
    """What all processes of a run have read; each adds to a file of its own."""

    def __init__(self, folder: Path, part: int) -> None:
        """Read what is known.

        Args:
            folder: Where the files of the processes are; created.
            part: Number of this process, which no other has.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._own = folder / f"part-{part}.jsonl"
        mend_last_line(self._own)
        self._known: dict[str, str] = {}
        for path in sorted(folder.glob("part-*.jsonl")):
            try:
                self._known.update((str(row["stamp"]), str(row["sha256"])) for row in read_lines(path))
            except (ValueError, KeyError):
                continue  # another process is writing its last line; what is not known is read again

    def of(self, path: Path) -> str:
        """The sha256 of a file's bytes.

        Raises:
            OSError: It cannot be read.
        """
        before = _stamp(path.stat())
        if before in self._known:
            return self._known[before]
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        after = path.stat()
        is_settled = time.time() - max(after.st_mtime, after.st_ctime) > SETTLED_SECONDS
        if is_settled and _stamp(after) == before:
            append_line(self._own, {"stamp": before, "sha256": digest})
            self._known[before] = digest
        return digest


def _stamp(found: os.stat_result) -> str:
    return f"{found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
