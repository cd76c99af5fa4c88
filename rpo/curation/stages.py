"""A lazy stage over records, and the pipeline that takes records through all stages.

Records go through the stages in chunks. A stage gets a chunk when the stage before is through with all of it, cuts it
to batches, and records every result at once. Batches are cut from the whole chunk and not from what is left to do, so
that a batch has the same members, and therefore the same bits, whether or not the run was killed in between; a batch
that was recorded in part is asked again, and only what is missing is recorded.

Components that take several batches at a time (a server) are called in threads; the others are called in the main
thread, one batch after the other, and the latest stage that has a batch ready goes first. So the first pairs come
early, and while the main thread draws or edits one chunk the server is busy with another: with one chunk at a time,
either would wait for the other.

Until a component has answered something in this session, the faults of what it raised on are held back, and so are the
chunks that they belong to: they are recorded with the first answer, or never, if there is none.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, Protocol, TypeVar, final

from rpo.curation.blame import Probation, ask_each, is_raised
from rpo.curation.folder import StageName
from rpo.curation.history import fault_in
from rpo.curation.parts import Row, StageRecords
from rpo.curation.records import Fault
from rpo.errors import InputError

Item = TypeVar("Item")
Answer = TypeVar("Answer")

CHUNKS_AHEAD = 4
"""Chunks under way at the same time: enough to keep a server and a GPU busy, few enough to see whole pairs early."""


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
    component: str = "the component"
    """What messages call what is asked."""

    def __post_init__(self) -> None:
        """Refuse a component that wants no items."""
        for what, value in (("batch_size", self.batch_size), ("concurrency", self.concurrency)):
            if value < 1:
                raise InputError(
                    f"stage '{self.name}': {self.component} has {what} {value}; expected at least 1; change that"
                )


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
        """Say what is done to each record."""
        self._stages = stages
        self._records = records
        self._observer = observer
        self._local: list[_Lot] = []
        self._remote: dict[Future[None], _Lot] = {}
        self._pools: dict[StageName, ThreadPoolExecutor] = {}
        self._probations = {one.name: Probation(f"stage '{one.name}': {one.component}") for one in stages}
        self._held: dict[StageName, list[tuple[str, Fault]]] = {}
        self._held_lots: list[_Lot] = []
        self._lock = threading.Lock()
        self._error: BaseException | None = None

    def run(self, chunks: Iterable[Sequence[str]]) -> None:
        """Take every chunk through all stages; what is recorded already is not asked again."""
        waiting = enumerate(chunks)
        with ExitStack() as stack:
            for stage in self._stages:
                if stage.concurrency > 1:
                    self._pools[stage.name] = stack.enter_context(ThreadPoolExecutor(stage.concurrency, stage.name))
            try:
                while self._open_more(waiting) or self._local or self._remote or self._let_go_of_the_last():
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
        """A batch is through; chunks that are through with a component that works go on to the next stage."""
        lot.num_open -= 1
        if lot.num_open == 0:
            self._local = [one for one in self._local if one is not lot]
            self._held_lots.append(lot)
        with self._lock:
            known = [(one, self._probation(one).is_passed) for one in self._held_lots]
        self._held_lots = [one for one, is_passed in known if not is_passed]
        for one, is_passed in known:
            if is_passed:
                self._advance(one)

    def _let_go_of_the_last(self) -> bool:
        """Nothing is left to ask: whether chunks were held back that may go on, as their component once answered."""
        if not self._held_lots:
            return False
        lot = self._held_lots.pop()
        stage = self._stages[lot.stage_index]
        records = self._records[stage.name]
        has_answered = any(not is_raised(fault_in(records[one])) for one in records)
        self._probation(lot).end(has_answered_before=has_answered)
        self._record_held(stage, self._held.pop(stage.name, []))
        self._advance(lot)
        return True

    def _probation(self, lot: _Lot) -> Probation:
        return self._probations[self._stages[lot.stage_index].name]

    def _do(self, stage: Stage, batch: Sequence[str]) -> None:
        """Ask for one batch, and record what is not recorded yet; nothing more is asked after an error."""
        if self._error is not None:
            raise self._error
        self._observer.begin(stage.name)
        try:
            items = [stage.load(one) for one in batch]
            answers = stage.ask(items) if stage.is_strict else ask_each(stage.ask, items)
            done = self._records[stage.name]
            new = [one for one in zip(batch, items, answers, strict=True) if one[0] not in done]
            faults = [(record, answer) for record, _, answer in new if isinstance(answer, Fault)]
            if self._is_let_through(stage, answers, faults):
                for record, item, answer in new:
                    row = answer if isinstance(answer, Fault) else stage.keep(record, item, answer)
                    self._record(stage, record, row)
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._observer.end(stage.name)

    def _is_let_through(self, stage: Stage, answers: Sequence[object], faults: Sequence[tuple[str, Fault]]) -> bool:
        """Whether a component has answered, so that what it raised on is recorded; if not, that is held back."""
        probation = self._probations[stage.name]
        with self._lock:
            if probation.is_passed:
                return True
            held = self._held.pop(stage.name, [])  # and not put back if the component turns out to be broken
            probation.hear(answers)
            if probation.is_passed:
                self._record_held(stage, held)
            else:
                self._held[stage.name] = [*held, *faults]
            return probation.is_passed

    def _record_held(self, stage: Stage, held: Sequence[tuple[str, Fault]]) -> None:
        for record, fault in held:
            self._record(stage, record, fault)

    def _record(self, stage: Stage, record: str, row: Row | Fault) -> None:
        is_fault = isinstance(row, Fault)
        self._records[stage.name].append({"id": record, **({"fault": fault_row(row)} if is_fault else row)})
        self._observer.recorded(stage.name, row if is_fault else None)


def fault_row(fault: Fault) -> Row:
    """A fault as it is recorded."""
    return {"kind": fault.kind, "message": fault.message, "raw": fault.raw}


def cut(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """A sequence in pieces of `size`, the last of which may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]
