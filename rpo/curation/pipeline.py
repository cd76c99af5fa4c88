"""The pipeline: takes shards through all stages; what a stage is, is said in `rpo.curation.stages`.

A stage gets a shard when the stage before is through with all of it, and cuts it to batches. Batches are cut from the
whole shard, so that a batch has the same members, and therefore the same bits, whoever does the shard and whenever.

Components that take several batches at a time (a server) are called in threads; the others are called in the main
thread, one batch after the other, and the latest stage that has a batch ready goes first. So while the main thread
draws or edits one shard the server is busy with another: with one at a time, either would wait for the other.

If something stops the run, shards are sealed after the last stage that they are through with.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from typing import Generic, Protocol, TypeVar, final

from rpo.curation.faults import Patience, ask_each
from rpo.curation.records import Fault
from rpo.curation.store.mark import StageName
from rpo.curation.store.shard import Row, Shard
from rpo.errors import InputError

Item = TypeVar("Item")
Answer = TypeVar("Answer")

SHARDS_AHEAD = 3
"""Shards under way at the same time: enough to keep a server and a GPU busy, few enough to hold their images."""


@dataclass(frozen=True)
class Stage(Generic[Item, Answer]):
    """One step of curation: which records it takes, and how it makes a row of each."""

    name: StageName
    batch_size: int
    concurrency: int
    """Batches at the same time, in threads; 1 is the main thread."""
    load: Callable[[Shard, str], Item]
    """What the component needs of a record; an error stops the run."""
    ask: Callable[[Sequence[Item]], Sequence[Answer | Fault]]
    """The component; an error is the fault of one item, and is recorded."""
    keep: Callable[[Shard, str, Item, Answer], Row | Fault]
    """The row to record of an answer; an error stops the run."""
    wants: Callable[[Shard, str], bool] = lambda shard, record: True
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

    def took(self, stage: StageName, seconds: float) -> None:
        """A stage was at work on a shard for so long."""
        ...

    def recorded(self, stage: StageName, *, is_fault: bool) -> None:
        """A record has its row of a stage."""
        ...


@dataclass(eq=False)
class _Work:
    """What one stage has to do of one shard."""

    shard: Shard
    stage_index: int
    batches: deque[Sequence[str]] = field(default_factory=deque)
    num_open: int = 0
    began: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    """At work in the main thread."""
    patience: Patience = field(default_factory=lambda: Patience(""))


@final
class Pipeline:
    """Takes shards through stages."""

    def __init__(
        self,
        stages: Sequence[Stage],
        seal: Callable[[Shard], None],
        *,
        observer: Observer | None = None,
        answered: set[StageName] | None = None,
        within: Callable[[Shard], AbstractContextManager[object]] = lambda shard: nullcontext(),
    ) -> None:
        """Say what is done to each record.

        Args:
            seal: Called with each shard that is through with the stages.
            answered: Stages whose component is known to work; it grows.
            within: What batches of a shard are done within.
        """
        self._stages, self._seal, self._observer, self._within = stages, seal, observer, within
        self._answered = set[StageName]() if answered is None else answered
        self._local: list[_Work] = []
        self._remote: dict[Future[None], _Work] = {}
        self._open: list[Shard] = []
        self._pools: dict[StageName, ThreadPoolExecutor] = {}
        self._lock = threading.Lock()
        self._error: BaseException | None = None

    @property
    def overlaps(self) -> bool:
        """Whether several shards at a time are done sooner than one after the other."""
        return len({stage.concurrency > 1 for stage in self._stages}) > 1

    def run(self, shards: Iterable[Shard]) -> None:
        """Take every shard through all stages that it is not through with, and seal it."""
        waiting = iter(shards)
        try:
            with ExitStack() as stack:
                for stage in self._stages:
                    if stage.concurrency > 1:
                        self._pools[stage.name] = stack.enter_context(ThreadPoolExecutor(stage.concurrency, stage.name))
                try:
                    self._open_more(waiting)
                    while self._local or self._remote:
                        self._do_some()
                        self._open_more(waiting)
                finally:
                    for future in self._remote:
                        future.cancel()  # those that run are waited for
        except BaseException:
            for shard in self._open:
                if shard.num_through > shard.num_sealed:
                    with suppress(OSError):  # a full disk may be what stopped the run
                        self._seal(shard)
            raise

    def _open_more(self, waiting: Iterator[Shard]) -> None:
        """Begin with further shards as long as there is room; one that has nothing to do makes room at once."""
        while len(self._open) < SHARDS_AHEAD and (shard := next(waiting, None)) is not None:
            self._open.append(shard)
            self._advance(shard)

    def _advance(self, shard: Shard) -> None:
        """Give a shard to the next stage that has something to do with it, or seal it after the last."""
        for index, stage in enumerate(self._stages[shard.num_through :], start=shard.num_through):
            done = shard.rows[stage.name]
            wanted = cut([one for one in shard.ids if stage.wants(shard, one)], stage.batch_size)
            batches = deque(batch for batch in wanted if not all(one in done for one in batch))
            if batches:
                work = _Work(shard, index, batches, len(batches))
                work.patience = Patience(f"stage '{stage.name}': {stage.component}")
                if stage.concurrency == 1:
                    self._local.append(work)
                else:
                    pool = self._pools[stage.name]
                    self._remote |= {pool.submit(self._do, work, batch): work for batch in batches}
                return
            shard.num_through = index + 1
        self._open.remove(shard)
        self._seal(shard)

    def _do_some(self) -> None:
        """One batch in the main thread, or else wait for one in another thread; then see what has come of it."""
        if self._local:
            work = max(self._local, key=lambda one: (one.stage_index, -one.shard.number))
            start = time.perf_counter()
            self._do(work, work.batches.popleft())
            work.seconds += time.perf_counter() - start
            self._settle(work)
        elif self._remote:
            wait(self._remote, return_when=FIRST_COMPLETED)
        for future in [one for one in self._remote if one.done()]:
            work = self._remote.pop(future)
            future.result()
            self._settle(work)

    def _settle(self, work: _Work) -> None:
        """A batch is through; with the last one, the shard goes on to the next stage."""
        work.num_open -= 1
        if work.num_open == 0:
            stage = self._stages[work.stage_index]
            seconds = work.seconds if stage.concurrency == 1 else time.perf_counter() - work.began
            work.patience.end(is_known_to_work=stage.name in self._answered)
            if work.patience.has_answered:
                self._answered.add(stage.name)
            work.shard.took(stage.name, seconds)
            if self._observer is not None:
                self._observer.took(stage.name, seconds)
            self._local = [one for one in self._local if one is not work]
            work.shard.num_through = work.stage_index + 1
            self._advance(work.shard)

    def _do(self, work: _Work, batch: Sequence[str]) -> None:
        """Ask for one batch, and record the answers; nothing more is asked after an error."""
        if self._error is not None:
            raise self._error
        stage, shard = self._stages[work.stage_index], work.shard
        try:
            with self._within(shard):
                items = [stage.load(shard, one) for one in batch]
                answers = stage.ask(items) if stage.is_strict else ask_each(stage.ask, items)
                for record, item, answer in zip(batch, items, answers, strict=True):
                    self._record(stage, shard, record, item, answer)
                with self._lock:
                    work.patience.hear(answers)
        except BaseException as error:
            self._error = error
            raise

    def _record(self, stage: Stage, shard: Shard, record: str, item: object, answer: object) -> None:
        row = answer if isinstance(answer, Fault) else stage.keep(shard, record, item, answer)
        is_fault = isinstance(row, Fault)
        shard.record(stage.name, record, {"fault": asdict(row)} if is_fault else row)
        if self._observer is not None:
            self._observer.recorded(stage.name, is_fault=is_fault)


def cut(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """A sequence in pieces of `size`, the last of which may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]
