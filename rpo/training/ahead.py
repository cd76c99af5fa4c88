"""Micro-batches of which the next is made while the device is still busy with the last.

The host waits for the device once per update; what it can do before that costs nothing. Only where a micro-batch
depends on nothing that an update changes: a rollout has to wait for the weights that draw it.
"""

from collections.abc import Iterator
from typing import Generic, TypeVar, final

B = TypeVar("B")


@final
class Ahead(Generic[B]):
    """An iterator whose next item may be made before it is asked for; an error then waits until it is."""

    def __init__(self, items: Iterator[B]) -> None:
        """Wrap an iterator, of which nothing is asked yet."""
        self._items, self._made = items, list[B]()
        self._error: Exception | None = None

    def make_next(self) -> None:
        """Make the next item, if that is not done yet."""
        if self._made or self._error:
            return
        try:
            self._made.append(next(self._items))
        except Exception as error:
            self._error = error

    def __iter__(self) -> Iterator[B]:
        """Itself."""
        return self

    def __next__(self) -> B:
        """The item that was made, or the next one."""
        if self._error is not None:
            raise self._error
        return self._made.pop() if self._made else next(self._items)
