"""The shards of a run on a cluster of Ray: one actor per worker, with a GPU where the cluster has any.

Each actor loads every model once and has one call at a time, so that no more is handed out than is at work. An actor
that dies, with its node or by itself, gives its shards back to the others, and another actor is asked for in its place;
Ray starts that one when there is room. If this process dies, Ray ends the actors.
"""

import os
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

from rpo.curation.engines import hands_of
from rpo.curation.engines.local import require_shareable, tell
from rpo.curation.records import Unavailable
from rpo.curation.store.progress import Progress
from rpo.curation.store.shard import Identity, Mark, StageName
from rpo.curation.worker import Job, Task, Terms, Worker
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


@final
class RayEngine:
    """Actors of a cluster."""

    def __init__(self, job: Job) -> None:
        """Connect to the cluster, or start one on this machine; ask for actors, and wait for the first."""
        require_shareable(job)
        self._is_ours = not ray.is_initialized()
        if self._is_ours:
            ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
        gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
        self._make: Any = ray.remote(num_cpus=1, num_gpus=gpus)(_Actor).remote
        self._arguments = (job, os.getcwd())
        self._coming: dict[Any, Any] = {}
        """What an actor says when it has loaded everything, and the actor."""
        self._ready, self._actors = list[Any](), list[Any]()
        self._lost = 0
        try:
            for _ in range(job.config.workers):
                self._ask_for_actor()
            self._workers = job.config.workers
            while not self._ready:
                self._welcome(None)
        except BaseException:
            self.close()
            raise

    def do(self, tasks: Sequence[Task], terms: Terms, progress: Progress) -> list[Mark]:
        """Do the shards, one hand for each actor that is ready."""
        waiting = deque(hands_of(tasks, self._workers, overlaps=self._overlaps))
        working: dict[Any, tuple[Any, Sequence[Task]]] = {}
        marks, tries = list[Mark](), Counter[int]()
        given = ray.put(terms)
        while waiting or working:
            while waiting and self._ready:
                actor, hand = self._ready.pop(), waiting.popleft()
                working[actor.do.remote(hand, given)] = actor, hand
            done, _ = ray.wait([*working, *self._coming], num_returns=1)
            for reply in done:
                if reply in self._coming:
                    self._welcome(reply)
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
                    self._ask_for_actor()
                    continue
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

    def _ask_for_actor(self) -> None:
        actor = self._make(*self._arguments)
        self._actors.append(actor)
        self._coming[actor.made.remote()] = actor

    def _welcome(self, reply: Any) -> None:
        """Take in an actor that has loaded everything; None waits for one. One that died on the way is replaced."""
        if reply is None:
            (reply,), _ = ray.wait(list(self._coming), num_returns=1)
        actor = self._coming.pop(reply)
        try:
            self.identities, self._overlaps = self._result(reply)
        except RayError as error:
            self._lost += 1
            if self._lost >= TRIES and not self._ready:
                raise Unavailable(f"{TRIES} workers died loading their models, the last of: {error}") from error
            self._ask_for_actor()
        else:
            self._lost = 0
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

    def __init__(self, job: Job, folder: str) -> None:
        if Path(folder).is_dir():
            os.chdir(folder)  # paths of the settings may be relative
        self._job = job
        self._worker: Worker | None = None

    def made(self) -> tuple[dict[StageName, Identity], bool]:
        worker = self._loaded()
        return worker.identities, worker.overlaps

    def do(self, hand: Sequence[Task], terms: Terms) -> list[Mark]:
        return self._loaded().do(hand, terms)

    def _loaded(self) -> Worker:
        if self._worker is None:
            self._worker = Worker(self._job)
        return self._worker
