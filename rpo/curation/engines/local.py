"""The shards of a run on this machine: by this process, or by several, each with models of its own.

With several, worker k has the GPU k (modulo their number), and its share of the processor's threads. A worker that dies
ends the run; workers whose parent dies end at once, wherever they are.
"""

import multiprocessing
import os
import pickle
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import Any, final

import torch

from rpo.curation.engines import hands_of
from rpo.curation.records import Unavailable
from rpo.curation.store.address import Store
from rpo.curation.store.mark import Identity, ShardMark, StageName
from rpo.curation.store.progress import Progress
from rpo.curation.worker import CurationJob, Draw, JobTerms, Task, Worker
from rpo.errors import InputError

START = "spawn"
"""How processes are started: what has used a GPU cannot be forked."""


@final
class SingleEngine:
    """This process."""

    def __init__(self, job: CurationJob, draw: Draw) -> None:
        """Make its worker."""
        self._worker = Worker(job, draw=draw)
        self.identities: dict[StageName, Identity] = self._worker.identities

    def do(self, tasks: Sequence[Task], terms: JobTerms, progress: Progress) -> list[ShardMark]:
        """Do the shards; every record is heard of at once."""
        return self._worker.do(tasks, terms, progress)

    def close(self) -> None:
        """Nothing is held."""


@final
class ProcessEngine:
    """Several processes."""

    def __init__(self, job: CurationJob) -> None:
        """Start them, and wait for one that has loaded everything."""
        require_shareable(job)
        self._workers, context = job.config.workers, multiprocessing.get_context(START)
        ranks, others = context.SimpleQueue(), multiprocessing.active_children()
        for rank in range(self._workers):
            ranks.put(rank)
        self._pool = ProcessPoolExecutor(self._workers, context, _begin, (job, ranks))
        self._is_own = lambda child: child not in others
        try:
            self.identities, self._overlaps = self._result(self._pool.submit(_made))
        except BaseException:
            self.close()
            raise

    def do(self, tasks: Sequence[Task], terms: JobTerms, progress: Progress) -> list[ShardMark]:
        """Do the shards, a few more than there are workers handed out at a time."""
        waiting = iter(hands_of(tasks, self._workers, overlaps=self._overlaps))
        pending, marks = dict[Future[list[ShardMark]], Sequence[Task]](), list[ShardMark]()
        while True:
            for hand in waiting:
                pending[self._submit(hand, terms)] = hand
                if len(pending) > self._workers:
                    break
            if not pending:
                return marks
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                hand = pending.pop(future)
                found = self._result(future)
                marks += found
                tell(progress, hand, found)

    def close(self) -> None:
        """End the workers, whatever they do."""
        own = [child for child in multiprocessing.active_children() if self._is_own(child)]
        self._pool.shutdown(wait=False, cancel_futures=True)
        for child in own:
            child.kill()
        for child in own:
            child.join()

    def _submit(self, hand: Sequence[Task], terms: JobTerms) -> "Future[list[ShardMark]]":
        try:
            return self._pool.submit(_do, hand, terms)
        except BrokenProcessPool as error:
            raise _died() from error

    def _result(self, future: Future[Any]) -> Any:
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise _died() from error


def tell(progress: Progress, hand: Sequence[Task], marks: Sequence[ShardMark]) -> None:
    """Let the progress know of shards that another process has sealed."""
    before = {task.planned.number: task.before for task in hand}
    for mark in marks:
        progress.sealed(before[mark.number], mark.tally)


def _died() -> Unavailable:
    return Unavailable(
        "a worker process died (of too little memory, or somebody has killed it); what was sealed is kept"
    )


def require_shareable(job: CurationJob) -> None:
    """Refuse a run that other processes cannot work at."""
    if not Store(job.config.output).is_shared:
        raise InputError(
            f"output is {job.config.output} and there are {job.config.workers} workers, who cannot see each other's "
            "memory; expected a place that all see; give a folder, or workers=1"
        )
    try:
        pickle.dumps(job)
    except Exception as error:
        raise InputError(
            f"a component of your own cannot be handed to {job.config.workers} workers ({error}); expected one that "
            "can be pickled; name what makes it as package.module:attribute in the settings, or give workers=1"
        ) from error


# What follows runs in a worker process.

_HERE: dict[str, Any] = {}
"""The job and the worker of this process."""


def _begin(job: CurationJob, ranks: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    rank = ranks.get()
    if gpus := torch.cuda.device_count():
        os.environ |= {"CUDA_VISIBLE_DEVICES": _visible()[rank % gpus], "LOCAL_RANK": "0"}
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // job.config.workers))
    _HERE["job"] = job


def _visible() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",") if named else [str(one) for one in range(torch.cuda.device_count())]


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)


def _worker() -> Worker:
    if "worker" not in _HERE:
        _HERE["worker"] = Worker(_HERE["job"])
    return _HERE["worker"]


def _made() -> tuple[dict[StageName, Identity], bool]:
    worker = _worker()
    return worker.identities, worker.overlaps


def _do(hand: Sequence[Task], terms: JobTerms) -> list[ShardMark]:
    return _worker().do(hand, terms)
