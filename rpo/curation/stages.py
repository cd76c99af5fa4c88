"""A lazy stage over records, and the pipeline that takes records through all stages.

Records go through the stages in chunks. A stage gets a chunk when the stage before is through with all of it, cuts it
to batches, and records every result at once. Batches are cut from the whole chunk and not from what is left to do, so
that a batch has the same members, and therefore the same bits, whether or not the run was killed in between; a batch
that was recorded in part is asked again, and only what is missing is recorded.

Components that take several batches at a time (a server) are called in threads; the others are called in the main
thread, one batch after the other, and the latest stage that has a batch ready goes first. So the first pairs come
early, and while the main thread draws or edits one chunk the server is busy with another: with one chunk at a time,
either would wait for the other.
"""

import errno
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, Protocol, TypeVar, final

import torch

from rpo.curation.folder import StageName
from rpo.curation.parts import Row, StageRecords
from rpo.curation.records import Fault, Unavailable

Item = TypeVar("Item")
Answer = TypeVar("Answer")

CHUNKS_AHEAD = 4
"""Chunks under way at the same time: enough to keep a server and a GPU busy, few enough to see whole pairs early."""

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Stage(Generic[Item, Answer]):
    """One step of curation: which records it takes, and how it makes a row of each."""

    name: StageName
    batch_size: int
    concurrency: int
    """Batches at the same time, in threads; 1 is the main thread."""
    wants: Callable[[str], bool]
    """Whether a record, through with all stages before, comes here."""
    load: Callable[[str], Item]
    """What the component needs of a record; an error stops the run."""
    ask: Callable[[Sequence[Item]], Sequence[Answer | Fault]]
    """The component; an error is the fault of one item, and is recorded."""
    keep: Callable[[str, Item, Answer], Row | Fault]
    """The row to record of an answer; an error stops the run."""
    is_strict: bool = False
    """Whether an error of `ask` stops the run as well."""


class Observer(Protocol):
    """Hears what the pipeline does; may be called by several threads."""

    def begin(self, stage: StageName) -> None:
        """A batch of a stage has begun."""
        ...

    def end(self, stage: StageName) -> None:
        """A batch of a stage has ended, well or not."""
        ...

    def recorded(self, stage: StageName, fault: Fault | None) -> None:
        """A record has its row of a stage."""
        ...


@dataclass
class _Lot:
    """The batches of one stage and one chunk."""

    chunk: Sequence[str]
    number: int
    stage_index: int
    batches: deque[Sequence[str]] = field(default_factory=deque)
    num_open: int = 0


@final
class Pipeline:
    """Takes chunks of records through stages."""

    def __init__(self, stages: Sequence[Stage], records: dict[StageName, StageRecords], observer: Observer) -> None:
        """Say what is done to each record.

        Args:
            stages: In their order.
            records: Of each stage, open for writing.
            observer: Hears of progress.
        """
        self._stages = stages
        self._records = records
        self._observer = observer
        self._local: list[_Lot] = []
        self._remote: dict[Future[None], _Lot] = {}
        self._pools: dict[StageName, ThreadPoolExecutor] = {}

    def run(self, chunks: Iterable[Sequence[str]]) -> None:
        """Take every chunk through all stages; what is recorded already is not asked again.

        Args:
            chunks: Ids.

        Raises:
            Unavailable: A component cannot answer now; what the others were doing is recorded.
            OSError: The disk is full.
            ValueError: A record's image is missing or corrupt, or a component answered for another number of items.
        """
        waiting = enumerate(chunks)
        with ExitStack() as stack:
            for stage in self._stages:
                if stage.concurrency > 1:
                    self._pools[stage.name] = stack.enter_context(ThreadPoolExecutor(stage.concurrency, stage.name))
            try:
                while self._open_more(waiting) or self._local or self._remote:
                    self._do_some()
            finally:
                self._local.clear()
                for future in self._remote:
                    future.cancel()  # those that run are waited for, and recorded
                self._remote.clear()

    def _open_more(self, waiting: Iterator[tuple[int, Sequence[str]]]) -> bool:
        """Begin with further chunks as far as there is room; whether one was begun that has work to do."""
        room = CHUNKS_AHEAD - len({lot.number for lot in [*self._local, *self._remote.values()]})
        for number, chunk in islice(waiting, max(room, 0)):
            self._advance(_Lot(chunk, number, -1))
            return True
        return False

    def _advance(self, lot: _Lot) -> None:
        """Give a chunk to the next stage that has something to do with it."""
        for index in range(lot.stage_index + 1, len(self._stages)):
            stage = self._stages[index]
            done = self._records[stage.name]
            batches = [
                batch
                for batch in cut([one for one in lot.chunk if stage.wants(one)], stage.batch_size)
                if not all(one in done for one in batch)
            ]
            if batches:
                self._begin(_Lot(lot.chunk, lot.number, index, deque(batches), len(batches)))
                return

    def _begin(self, lot: _Lot) -> None:
        stage = self._stages[lot.stage_index]
        if stage.concurrency == 1:
            self._local.append(lot)
            return
        for batch in lot.batches:
            self._remote[self._pools[stage.name].submit(self._do, stage, batch)] = lot

    def _do_some(self) -> None:
        """One batch in the main thread, or else wait for one in another thread; then see what has come of it."""
        if self._local:
            lot = max(self._local, key=lambda one: (one.stage_index, -one.number))
            self._do(self._stages[lot.stage_index], lot.batches.popleft())
            self._settle(lot)
        elif self._remote:
            wait(self._remote, return_when=FIRST_COMPLETED)
        for future in [one for one in self._remote if one.done()]:
            lot = self._remote.pop(future)
            future.result()
            self._settle(lot)

    def _settle(self, lot: _Lot) -> None:
        lot.num_open -= 1
        if lot.num_open == 0:
            self._local = [one for one in self._local if one is not lot]
            self._advance(lot)

    def _do(self, stage: Stage, batch: Sequence[str]) -> None:
        """Ask for one batch, and record what is not recorded yet."""
        self._observer.begin(stage.name)
        try:
            items = [stage.load(one) for one in batch]
            answers = stage.ask(items) if stage.is_strict else ask_each(stage.ask, items)
            done = self._records[stage.name]
            for one, item, answer in zip(batch, items, answers, strict=True):
                if one in done:
                    continue
                row = answer if isinstance(answer, Fault) else stage.keep(one, item, answer)
                is_fault = isinstance(row, Fault)
                done.append({"id": one, **({"fault": fault_row(row)} if is_fault else row)})
                self._observer.recorded(stage.name, row if is_fault else None)
        finally:
            self._observer.end(stage.name)


def ask_each(ask: Callable[[Sequence[Item]], Sequence[Answer | Fault]], items: Sequence[Item]) -> list[Answer | Fault]:
    """The answers to a batch; if the component raises, to each item alone, so that one item is at fault and not all.

    Args:
        ask: The component.
        items: The batch.

    Raises:
        ValueError: The component answered for another number of items.
    """
    try:
        answers = list(ask(items))
    except Exception as error:
        if not is_of_item(error):
            raise
        if len(items) == 1:
            return [fault_of(error)]
        return [answer for item in items for answer in ask_each(ask, [item])]
    if len(answers) != len(items):
        raise ValueError(
            f"a component gave {len(answers)} answers for {len(items)} items; expected one for each, a result or a "
            "Fault; mend the component"
        )
    return answers


def is_of_item(error: Exception) -> bool:
    """Whether an exception may be the fault of the item that was asked about, and not of the machine."""
    seen: BaseException | None = error
    while seen is not None:  # a library may have wrapped what the machine said
        if isinstance(seen, Unavailable | MemoryError | torch.OutOfMemoryError):
            return False
        if isinstance(seen, OSError) and seen.errno in _FULL_DISK:
            return False
        seen = seen.__cause__
    return True


def fault_of(error: Exception) -> Fault:
    """What is recorded of an exception."""
    return Fault("raised", f"{type(error).__name__}: {error}")


def fault_row(fault: Fault) -> Row:
    """A fault as it is recorded."""
    return {"kind": fault.kind, "message": fault.message, "raw": fault.raw}


def cut(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """A sequence in pieces of `size`, the last of which may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]
