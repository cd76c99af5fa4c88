"""Hold back Ctrl-C for a moment: an update is committed whole or not at all."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Deliver a Ctrl-C that arrives inside the block at its end.

    Python hands signals to the main thread only, so elsewhere there is nothing to hold back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _frame: arrived.append(number))
    try:
        yield
    finally:
        # None stands for a handler that was not installed from Python, which cannot be put back from here either.
        signal.signal(signal.SIGINT, signal.SIG_DFL if previous is None else previous)
    if arrived:
        signal.raise_signal(signal.SIGINT)
