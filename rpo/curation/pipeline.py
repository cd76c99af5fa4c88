"""The pipeline: takes records through all stages; what a stage is, is said in `rpo.curation.stages`.

Records go through the stages in chunks. A stage gets a chunk when the stage before is through with all of it, cuts it
to batches, and records every result at once. Batches are cut from the whole chunk and not from what is left to do, so
that a batch has the same members, and therefore the same bits, whether or not the run was killed in between; a batch
that was recorded in part is asked again, and only what is missing is recorded.

Components that take several batches at a time (a server) are called in threads; the others are called in the main
thread, one batch after the other, and the latest stage that has a batch ready goes first. So the first pairs come
early, and while the main thread draws or edits one chunk the server is busy with another: with one chunk at a time,
either would wait for the other.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Generic, Protocol, TypeVar, final

from rpo.curation.faults import Patience, ask_each
from rpo.curation.records import Fault
from rpo.curation.store.folder import StageName
from rpo.curation.store.shards import Row, StageRecords
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
    load: Callable[[str], Item]
    """What the component needs of a record; an error stops the run."""
    ask: Callable[[Sequence[Item]], Sequence[Answer | Fault]]
    """The component; an error is the fault of one item, and is recorded."""
    keep: Callable[[str, Item, Answer], Row | Fault]
    """The row to record of an answer; an error stops the run."""
    wants: Callable[[str], bool] = lambda record: True
    """Whether a record, through with all stages before, comes here."""
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

    def batch(self, stage: StageName) -> AbstractContextManager[None]:
        """A batch of a stage is at work meanwhile."""
        ...

    def recorded(self, stage: StageName, *, is_fault: bool) -> None:
        """A record has its row of a stage."""
        ...


@dataclass(eq=False)
class _Work:
    """What one stage has to do of one chunk."""

    chunk: Sequence[str]
    number: int
    stage_index: int
    batches: deque[Sequence[str]] = field(default_factory=deque)
    num_open: int = 0


@final
class Pipeline:
    """Takes chunks of records through stages."""

    def __init__(self, stages: Sequence[Stage], records: Mapping[StageName, StageRecords], observer: Observer) -> None:
        """Say what is done to each record."""
        self._stages, self._records, self._observer = stages, records, observer
        self._local: list[_Work] = []
        self._remote: dict[Future[None], _Work] = {}
        self._pools: dict[StageName, ThreadPoolExecutor] = {}
        self._patience = {one.name: Patience(f"stage '{one.name}': {one.component}") for one in stages}
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
                while self._open_more(waiting) or self._local or self._remote:
                    self._do_some()
            finally:
                self._local.clear()
                for future in self._remote:
                    future.cancel()  # those that run are waited for, and recorded
                self._remote.clear()
        for stage in self._stages:
            self._patience[stage.name].end(self._records[stage.name])

    def _open_more(self, waiting: Iterator[tuple[int, Sequence[str]]]) -> bool:
        """Begin with a further chunk if there is room; whether one was begun."""
        room = CHUNKS_AHEAD - len({work.number for work in [*self._local, *self._remote.values()]})
        for number, chunk in islice(waiting, min(room, 1)):
            self._advance(_Work(chunk, number, -1))
            return True
        return False

    def _advance(self, work: _Work) -> None:
        """Give a chunk to the next stage that has something to do with it."""
        for index, stage in enumerate(self._stages[work.stage_index + 1 :], start=work.stage_index + 1):
            done = self._records[stage.name]
            wanted = cut([one for one in work.chunk if stage.wants(one)], stage.batch_size)
            batches = deque(batch for batch in wanted if not all(one in done for one in batch))
            if not batches:
                continue
            following = _Work(work.chunk, work.number, index, batches, len(batches))
            if stage.concurrency == 1:
                self._local.append(following)
            else:
                pool = self._pools[stage.name]
                self._remote |= {pool.submit(self._do, stage, batch): following for batch in batches}
            return

    def _do_some(self) -> None:
        """One batch in the main thread, or else wait for one in another thread; then see what has come of it."""
        if self._local:
            work = max(self._local, key=lambda one: (one.stage_index, -one.number))
            self._do(self._stages[work.stage_index], work.batches.popleft())
            self._settle(work)
        elif self._remote:
            wait(self._remote, return_when=FIRST_COMPLETED)
        for future in [one for one in self._remote if one.done()]:
            work = self._remote.pop(future)
            future.result()
            self._settle(work)

    def _settle(self, work: _Work) -> None:
        """A batch is through; with the last one, the chunk goes on to the next stage."""
        work.num_open -= 1
        if work.num_open == 0:
            self._local = [one for one in self._local if one is not work]
            self._advance(work)

    def _do(self, stage: Stage, batch: Sequence[str]) -> None:
        """Ask for one batch, and record what is not recorded yet; nothing more is asked after an error."""
        if self._error is not None:
            raise self._error
        try:
            with self._observer.batch(stage.name):
                items = [stage.load(one) for one in batch]
                answers = stage.ask(items) if stage.is_strict else ask_each(stage.ask, items)
                done = self._records[stage.name]
                new = [one for one in zip(batch, items, answers, strict=True) if one[0] not in done]
                for record, item, answer in new:
                    row = answer if isinstance(answer, Fault) else stage.keep(record, item, answer)
                    self._record(stage, record, row)
                with self._lock:
                    self._patience[stage.name].hear(answers)
        except BaseException as error:
            self._error = error
            raise

    def _record(self, stage: Stage, record: str, row: Row | Fault) -> None:
        is_fault = isinstance(row, Fault)
        self._records[stage.name].append({"id": record, **({"fault": asdict(row)} if is_fault else row)})
        self._observer.recorded(stage.name, is_fault=is_fault)


def cut(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """A sequence in pieces of `size`, the last of which may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]
