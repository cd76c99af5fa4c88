"""Signals that end a run: each keeps what Ctrl-C keeps, and none tears an update apart.

A terminal that is closed sends SIGHUP, a scheduler whose time is up SIGTERM. Python would die of either on the spot.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_ENDING = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]  # Windows has no SIGHUP


class Terminated(SystemExit):  # noqa: N818 - no error: somebody wants the process to end
    """The process was asked to end; a program that lets it pass ends with the exit code 128 + the signal."""

    def __init__(self, number: int) -> None:
        """Remember the signal."""
        super().__init__(128 + number)
        self.exit_code = 128 + number


@contextmanager
def ended_in_order() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise `Terminated`, as Ctrl-C raises `KeyboardInterrupt`.

    A handler of the caller's own stays, and so does `nohup`. One of several processes of a run dies at once, as it may
    wait for the others without end. Python hands signals to the main thread only: elsewhere there is nothing to do.
    """
    is_alone = int(os.environ.get("WORLD_SIZE", "1")) == 1 and threading.current_thread() is threading.main_thread()
    ours = [number for number in _ENDING if is_alone and signal.getsignal(number) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _end(number: int, _frame: FrameType | None) -> None:
    raise Terminated(number)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Deliver a Ctrl-C, SIGTERM or SIGHUP that arrives inside the block at its end.

    Python hands signals to the main thread only, so elsewhere there is nothing to hold back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, *_ENDING)}
    # A handler that was not installed from Python is None and cannot be put back from here.
    ours = [number for number, handler in previous.items() if handler != signal.SIG_IGN and handler is not None]
    for number in ours:
        signal.signal(number, lambda number, _frame: arrived.append(number))
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, previous[number])
    for number in dict.fromkeys(arrived):
        signal.raise_signal(number)
