"""Whose fault an exception of a component is: the item's, the component's, or the machine's.

An exception about a single item is that item's fault, and the run goes on. One that the machine threw (no server, no
memory, a broken GPU, a full disk) stops the run. And a component that raises on `PATIENCE` items of a shard one after
the other, or on all where there are fewer, is broken: the run stops, and the shard is not sealed after this stage. A
wrong answer (no JSON, the wrong form, nothing at all) is the model's own, and shows that it works.
"""

import errno
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, final

import torch

from rpo.curation.records import Fault, Unavailable
from rpo.errors import InputError

Item = TypeVar("Item")
Answer = TypeVar("Answer")

PATIENCE = 8
"""Items in a row on which a component may raise: one or two odd images come by chance, not so many."""

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_RAW_SHOWN = 300


def ask_each(ask: Callable[[Sequence[Item]], Sequence[Answer | Fault]], items: Sequence[Item]) -> list[Answer | Fault]:
    """The answers to a batch; if the component raises, to each item alone, so that one item is at fault and not all."""
    try:
        answers = list(ask(items))
    except Exception as error:
        if not is_of_item(error):
            raise
        if len(items) == 1:
            return [Fault("raised", f"{type(error).__name__}: {error}")]
        return [answer for item in items for answer in ask_each(ask, [item])]
    if len(answers) != len(items):
        raise InputError(
            f"a component gave {len(answers)} answers for {len(items)} items; expected one for each, a result or a "
            "Fault; mend the component"
        )
    return answers


def is_of_item(error: Exception) -> bool:
    """Whether an exception may be the fault of the item that was asked about, and not of the machine."""
    seen: BaseException | None = error
    while seen is not None:  # a library may have wrapped what the machine said
        if isinstance(seen, Unavailable | MemoryError | torch.OutOfMemoryError | torch.AcceleratorError):
            return False
        if isinstance(seen, OSError) and seen.errno in _FULL_DISK:
            return False
        seen = seen.__cause__
    return True


def is_raised(answer: object) -> bool:
    """Whether an answer is no answer but an exception."""
    return isinstance(answer, Fault) and answer.kind == "raised"


def in_words(what: str, identity: Mapping[str, str]) -> str:
    """A component as messages call it.

    Example:
        >>> in_words("critic", {"kind": "server", "model": "llava", "seed": "0"})
        'the critic (kind server, model llava)'
    """
    known = ", ".join(f"{key} {identity[key]}" for key in ("kind", "model") if identity.get(key))
    return f"the {what} ({known})" if known else f"the {what}"


def broken(who: str, last: Fault, on: str) -> InputError:
    """The error for a component that has no answer to anything.

    Args:
        on: The items that it raised on, in words.
    """
    said = f"{last.message}: {last.raw[:_RAW_SHOWN]}" if last.raw else last.message
    return InputError(
        f"{who} raised on {on}, the last time with {said!r}; expected an answer to some of them, if only a wrong one; "
        "mend the component or its settings, or take out the items that it cannot be asked about, and run again (`rpo "
        "curate` with --resume): nothing is kept of these items"
    )


@final
class Patience:
    """Counts the items of a shard in a row on which a component has raised.

    Attributes:
        has_answered: Whether it has answered about any.
    """

    def __init__(self, who: str) -> None:
        """Begin to count.

        Args:
            who: What messages call the component, and where it is asked.
        """
        self._who, self._raised, self.has_answered = who, list[Fault](), False

    def hear(self, answers: Sequence[object]) -> None:
        """Take the answers to a batch; refuse a component that is broken."""
        for answer in answers:
            if isinstance(answer, Fault) and is_raised(answer):
                self._raised.append(answer)
            else:
                self._raised, self.has_answered = [], True
        if len(self._raised) >= PATIENCE:
            raise broken(self._who, self._raised[-1], f"{len(self._raised)} items in a row")

    def end(self, *, is_known_to_work: bool) -> None:
        """The shard is through: refuse a component that has never answered, however few the items were.

        Args:
            is_known_to_work: Whether it has answered about items of another shard.
        """
        if not self._raised or self.has_answered or is_known_to_work:
            return
        number = len(self._raised)
        on = "the only item that there is" if number == 1 else f"all {number} items that there are"
        raise broken(self._who, self._raised[-1], on)
