"""A run's folder belongs to one process at a time.

The system lets go of a lock when its owner dies, however it dies, so nothing stale is left. What the lock file says
names the owner for the message that the other gets.
"""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from rpo.errors import InputError
from rpo.files.text import read_text, write_text

LOCK = ".lock"
"""The lock file of a folder."""


@contextmanager
def sole_owner(folder: Path, *, is_main: bool = True) -> Iterator[None]:
    """Hold a run's folder; whoever comes meanwhile is refused at once.

    Inside, the same thread may ask again. Only the main one of several processes that make one run holds it.
    """
    if not is_main:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    key = (os.getpid(), threading.get_ident(), folder.resolve())
    if key in _ours:
        yield
        return
    with taken(folder / LOCK, f"{folder} is in use"):
        _ours.add(key)
        try:
            yield
        finally:
            _ours.discard(key)


_ours: set[tuple[int, int, Path]] = set()
"""Process, thread and folder of what is held here; a forked child holds nothing."""


@contextmanager
def taken(path: Path, what: str, remedy: str = "wait until it has ended, or choose another folder") -> Iterator[None]:
    """Hold one lock file, and say in it who does."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"{what} by {_owner(path)}; expected one process at a time; {remedy}") from None
    try:
        write_text(path, f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        with suppress(OSError):
            write_text(path, "")
        lock.release()


@contextmanager
def taken_if_free(path: Path) -> Iterator[bool]:
    """Hold one lock file unless somebody does already; inside, whether it is held here."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(taken(path, f"{path} is held"))
            is_ours = True
        except InputError:
            is_ours = False
        yield is_ours


def _owner(path: Path) -> str:
    try:
        return read_text(path) or "another process"
    except (OSError, ValueError):  # Windows lets nobody read a locked file
        return "another process"
