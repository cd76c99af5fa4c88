"""Files in the making: they are called by who writes them, so that what a killed writer has left can be told.

    .0000017.json.<machine>-<process>.partial

The number of a process says something only where it was given, so a machine is what shares its numbers: a host, since
it was started, and on it a container. Of another machine nobody knows who lives there, and age decides.
"""

import hashlib
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from rpo.files.text import read_text

OLD_SECONDS = 86_400.0
"""What nobody has written to for so long has no writer, wherever: files take seconds, the largest ones minutes."""

SUFFIX = ".partial"

_NAME = re.compile(r"\..+\.([0-9a-f]{12})-(\d+)\.partial")


def partial_of(path: Path) -> Path:
    """Where this process writes what will be `path`."""
    return path.with_name(f".{path.name}.{_machine()}-{os.getpid()}{SUFFIX}")


def sweep(folder: Path, *, is_deep: bool = False) -> int:
    """Take away what killed writers have left in a folder, and nothing of anybody who lives.

    Args:
        is_deep: Whether to look into its folders as well.

    Returns:
        How many files that were.
    """
    found = [path for path in _partials(folder, is_deep) if _is_left(path)]
    for path in found:
        path.unlink(missing_ok=True)
    return len(found)


def _partials(folder: Path, is_deep: bool) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        yield from (Path(place, name) for name in names if name.endswith(SUFFIX))
        if not is_deep:
            folders.clear()


def _is_left(path: Path) -> bool:
    if (told := _NAME.fullmatch(path.name)) is None:
        return False
    if told[1] == _machine():
        return not _is_alive(int(told[2]))
    with suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime > OLD_SECONDS
    return False


def _is_alive(process: int) -> bool:
    """Whether there is such a process; in doubt there is."""
    if sys.platform == "win32":
        return True  # asking would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


@cache
def _machine() -> str:
    """What tells apart those whose processes are numbered apart."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # Linux alone says these
        parts.append(read_text("/proc/sys/kernel/random/boot_id"))
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
