"""Who does the shards of a run: this process, several of this machine, or a cluster of Ray.

Every engine gives the same records, whatever the number of workers, their order and their deaths, for a shard is a
function of its plan and of the settings alone.
"""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Protocol

from rpo.curation.pipeline import SHARDS_AHEAD
from rpo.curation.store.mark import Identity, ShardMark, StageName
from rpo.curation.store.progress import Progress
from rpo.curation.worker import CurationJob, Draw, JobTerms, Task


class Engine(Protocol):
    """Does shards by one or more workers."""

    @property
    def identities(self) -> Mapping[StageName, Identity]:
        """What decides the results of each stage, as a worker says."""
        ...

    def do(self, tasks: Sequence[Task], terms: JobTerms, progress: Progress) -> list[ShardMark]:
        """Do the shards, and return their marks; the first error of a worker stops all."""
        ...

    def close(self) -> None:
        """Let the workers go."""
        ...


def engine_of(job: CurationJob, draw: Draw) -> Engine:
    """The engine that the settings name, with a worker that has loaded everything.

    Args:
        draw: What the images come from, for a worker in this process.
    """
    if job.config.engine == "ray":
        from rpo.curation.engines.on_ray import RayEngine

        return RayEngine(job)
    from rpo.curation.engines.local import ProcessEngine, SingleEngine

    return SingleEngine(job, draw) if job.config.workers == 1 else ProcessEngine(job)


def hands_of(tasks: Sequence[Task], workers: int, *, overlaps: bool) -> list[Sequence[Task]]:
    """Tasks as they are handed out: several at a time where a worker does them sooner so, but some for everybody."""
    size = min(SHARDS_AHEAD, ceil(len(tasks) / workers)) if overlaps and tasks else 1
    return [tasks[start : start + size] for start in range(0, len(tasks), size)]
