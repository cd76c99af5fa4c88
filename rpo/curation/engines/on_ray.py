"""The shards of a run on a cluster of Ray: one actor per worker, with a GPU where the cluster has any.

Each actor loads every model once and has one call at a time, so that no more is handed out than is at work. An actor
that dies, with its node or by itself, gives its shards back to the others, and another actor is asked for in its place;
Ray starts that one when there is room. If this process dies, Ray ends the actors.
"""

import os
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from rpo.curation.engines import hands_of
from rpo.curation.engines.local import require_shareable, tell
from rpo.curation.records import Unavailable
from rpo.curation.store.mark import Identity, ShardMark, StageName
from rpo.curation.store.progress import Progress
from rpo.curation.worker import CurationJob, JobTerms, Task, Worker
from rpo.errors import InputError

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
except ImportError as error:
    raise InputError(
        f"engine is ray, which cannot be imported ({error}); expected Ray; pip install 'rpo[ray]', or give engine=local"
    ) from error

TRIES = 5
"""Actors that one hand of shards may cost before it is given up: more is no bad luck."""

LOSSES = 20
"""Actors that may die in a row before they have loaded, and while nothing is done."""


@final
class RayEngine:
    """Actors of a cluster."""

    def __init__(self, job: CurationJob) -> None:
        """Connect to the cluster, or start one on this machine; ask for actors, and wait for the first."""
        require_shareable(job)
        self._is_ours = not ray.is_initialized()
        if self._is_ours:
            ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
        gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
        self._make: Any = ray.remote(num_cpus=1, num_gpus=gpus)(_Actor).remote
        self._arguments, self._workers = (job, os.getcwd()), job.config.workers
        self._actors, self._ready = list[Any](), list[Any]()
        self._coming: dict[Any, Any] = {}
        """What an actor says when it has loaded everything, and the actor."""
        self._due = [0.0] * self._workers
        """When to ask for actors that are missing: not at once, for a lost node is noticed late."""
        self._lost = 0
        try:
            while not self._ready:
                self._next({})
        except BaseException:
            self.close()
            raise

    def do(self, tasks: Sequence[Task], terms: JobTerms, progress: Progress) -> list[ShardMark]:
        """Do the shards, one hand for each actor that is ready."""
        waiting = deque(hands_of(tasks, self._workers, overlaps=self._overlaps))
        working: dict[Any, tuple[Any, Sequence[Task]]] = {}
        marks, tries, given = list[ShardMark](), Counter[int](), ray.put(terms)
        while waiting or working:
            while waiting and self._ready:
                actor, hand = self._ready.pop(), waiting.popleft()
                working[actor.do.remote(hand, given)] = actor, hand
            if (reply := self._next(working)) is None:
                continue
            actor, hand = working.pop(reply)
            try:
                found = self._result(reply)
            except RayError as error:
                number = hand[0].planned.number
                tries[number] += 1
                if tries[number] >= TRIES:
                    raise Unavailable(f"{TRIES} workers died of shard {number}, the last of: {error}") from error
                waiting.append(hand)
                self._due.append(0.0)
            else:
                self._lost = 0
                self._ready.append(actor)
                marks += found
                tell(progress, hand, found)
        return marks

    def close(self) -> None:
        """Let the actors go, and the cluster if it was started here."""
        for actor in self._actors:
            ray.kill(actor)
        if self._is_ours:
            ray.shutdown()

    def _next(self, working: Mapping[Any, object]) -> Any:
        """What is done next of the work, if that is soon; actors that come meanwhile are made ready."""
        now = time.monotonic()
        for _ in [due for due in self._due if due <= now]:
            actor = self._make(*self._arguments)
            self._actors.append(actor)
            self._coming[actor.made.remote()] = actor
        self._due = [due for due in self._due if due > now]
        awaited = [*working, *self._coming]
        done = ray.wait(awaited, num_returns=1, timeout=1)[0] if awaited else time.sleep(1)
        for reply in done or ():
            if reply in working:
                return reply
            self._welcome(reply)
        return None

    def _welcome(self, reply: Any) -> None:
        """Take in an actor that has loaded everything; one that died on the way is asked for again, later each time."""
        actor = self._coming.pop(reply)
        try:
            self.identities, self._overlaps = self._result(reply)
        except RayError as error:
            self._lost += 1
            if self._lost >= LOSSES:
                raise Unavailable(f"{LOSSES} workers died loading their models, the last of: {error}") from error
            self._due.append(time.monotonic() + min(2**self._lost, 15))
        else:
            self._ready.append(actor)

    def _result(self, reply: Any) -> Any:
        """What a worker gave, or the error that it raised."""
        try:
            return ray.get(reply)
        except RayTaskError as error:
            cause = error.cause
            raise (cause if isinstance(cause, Exception) else error) from None


class _Actor:
    """A worker that loads its models when it is first asked."""

    def __init__(self, job: CurationJob, folder: str) -> None:
        if Path(folder).is_dir():
            os.chdir(folder)  # paths of the settings may be relative
        self._job = job
        self._worker: Worker | None = None

    def made(self) -> tuple[dict[StageName, Identity], bool]:
        worker = self._loaded()
        return worker.identities, worker.overlaps

    def do(self, hand: Sequence[Task], terms: JobTerms) -> list[ShardMark]:
        return self._loaded().do(hand, terms)

    def _loaded(self) -> Worker:
        if self._worker is None:
            self._worker = Worker(self._job)
        return self._worker
