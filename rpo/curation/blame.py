"""Whose fault an exception of a component is: the item's, the component's, or the machine's.

An exception about a single item is that item's fault, and the run goes on. One that the machine threw (no server, no
memory, a broken GPU, a full disk) stops the run. And a component that has answered nothing yet is on probation: if it
raises on each of the first `PATIENCE` items, or on all where there are fewer, it is broken, and the run stops with
nothing recorded. A wrong answer (no JSON, the wrong form, nothing at all) is the model's own, and shows that it works.
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
"""Items in a row, from the first, on which a component may raise: one or two odd images come first by chance, not so
many."""

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
            return [fault_of(error)]
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


def fault_of(error: Exception) -> Fault:
    """What is recorded of an exception."""
    return Fault("raised", f"{type(error).__name__}: {error}")


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


@final
class Probation:
    """Listens to what a component answers until it has answered something.

    Attributes:
        is_passed: Whether it has.
    """

    def __init__(self, who: str, *, patience: float = PATIENCE) -> None:
        """Begin to listen.

        Args:
            who: What messages call the component, and where it is asked.
            patience: Items on which it may raise before it is broken.
        """
        self._who = who
        self._patience = patience
        self._raised: list[Fault] = []
        self.is_passed = False

    def hear(self, answers: Sequence[object]) -> None:
        """Take the answers to a batch."""
        if self.is_passed:
            return
        self.is_passed = not all(map(is_raised, answers))
        self._raised += [one for one in answers if isinstance(one, Fault)]
        if not self.is_passed and len(self._raised) >= self._patience:
            raise self._failed(f"each of the first {len(self._raised)} items that it was asked about")

    def end(self, *, has_answered_before: bool = False) -> None:
        """Nothing more will be asked.

        Args:
            has_answered_before: Whether it has answered in an earlier session, so that the last few may be odd.
        """
        if self._raised and not (self.is_passed or has_answered_before):
            number = len(self._raised)
            raise self._failed("the only item that there is" if number == 1 else f"all {number} items that there are")
        self.is_passed = True

    def _failed(self, on: str) -> InputError:
        last = self._raised[-1]
        said = f"{last.message}: {last.raw[:_RAW_SHOWN]}" if last.raw else last.message
        return InputError(
            f"{self._who} raised on {on}, the last time with {said!r}; expected an answer to some of them, if only a "
            "wrong one; mend the component or its settings, or take out the items that it cannot be asked about, and "
            "run again (`rpo curate` with --resume): nothing was recorded of these items"
        )
