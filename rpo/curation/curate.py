"""Curation from one call: prompts or images in, preference pairs that say why one image is better out.

`curate(config)` plans the records and cuts them to shards, makes the components, checks that what is there was made by
the same ones, and lets the shards be done. A shard is in the run's place once it is through, and models' answers at
once: killed at any moment and called again, it goes on, and ends with what it would have ended with.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tqdm.auto import tqdm

from rpo.config.load import to_yaml
from rpo.curation.curate_config import CurateConfig
from rpo.curation.decide import check_rules
from rpo.curation.engines import Engine, engine_of
from rpo.curation.generate import plan_generation
from rpo.curation.score import check_filters
from rpo.curation.sources import SourcePlan, plan_import
from rpo.curation.store.address import Store
from rpo.curation.store.mark import FOLDER, STAGES, ShardMark, StageName, Tally, read_marks
from rpo.curation.store.progress import Progress
from rpo.curation.store.run import SETTINGS, Share, claim, share_of
from rpo.curation.vlm.answers import ANSWERS
from rpo.curation.worker import Components, CurationJob, JobTerms, Task
from rpo.errors import InputError
from rpo.interrupts import ended_in_order

__all__ = ["Components", "CurateConfig", "curate"]


def curate(config: CurateConfig, *, resume: bool = False, components: Components | None = None) -> str:
    """Take all records of this process's share through the stages, as far as `stop_after`.

    Args:
        config: The run.
        resume: Go on with a run in the same place.
        components: Objects of one's own.

    Returns:
        Where the run is, as the settings say; see `rpo.curation.export` and `rpo.curation.status`.

    Raises:
        ValueError: There is a run and `resume` was not asked for, or one that was made otherwise; or the settings, a
            component or an item of the source cannot be used, or a component raises on everything. Says which and why.
        Unavailable: A server or device cannot answer now, or a worker died; resume later.
        OSError: The disk is full; what was sealed is kept.

    Example:
        >>> curate(CurateConfig(output="runs/curate"))                   # doctest: +SKIP
        'runs/curate'
    """
    check_settings(config)
    share, store = share_of(config.shards, os.environ), Store(config.output)
    marks = {mark.number: mark for mark in read_marks(store)}
    if any(map(share.owns, marks)) and not resume:
        raise InputError(
            f"{config.output} holds a run already; give --resume (resume=True) to go on with it, or another output"
        )
    with ended_in_order():
        plan = (plan_generation if config.source.kind == "generate" else plan_import)(config.source, config.shard)
        if plan.num_duplicates and share.index == 0:
            tqdm.write(f"{plan.num_duplicates} images came again with the same caption; each is done once")
        engine = engine_of(CurationJob(config, components or Components(), plan.identity), plan.draw)
        try:
            _Call(config, store, share, plan, engine, marks).run()
        finally:
            engine.close()
    return config.output


def check_settings(config: CurateConfig) -> None:
    """Refuse settings that cannot be met, before anything is loaded."""
    check_rules(config.decide)
    check_filters(config.decide, config.evaluation, config.critic.kind)
    if config.decide.orderings == "all" and config.source.kind != "pairs":
        raise InputError(
            f"decide.orderings is 'all', and source.kind {config.source.kind!r}; expected given pairs, whose sides and "
            "edits can be ordered; give source.kind=pairs, or decide.orderings=own"
        )
    if config.decide.orderings == "prompt" and config.source.kind != "generate":
        raise InputError(
            f"decide.orderings is 'prompt', and source.kind {config.source.kind!r}; expected images that are "
            "generated, several for a prompt; give source.kind=generate, or decide.orderings=own"
        )


@dataclass
class _Call:
    """What one call does of a run."""

    config: CurateConfig
    store: Store
    share: Share
    plan: SourcePlan
    engine: Engine
    marks: dict[int, ShardMark]

    def run(self) -> None:
        """Do the shards of this share that are not done."""
        config, plan = self.config, self.plan
        self._sweep()
        cut = (plan.records, len(plan.shards), config.shard)
        made_by = claim(self.store, self.engine.identities, cut, self.marks.values(), config.redo).made_by
        if self.share.index == 0:
            self.store.write(SETTINGS, to_yaml(config).encode())
        own = [one for one in plan.shards if self.share.owns(one.number)]
        for one in own:
            mark = self.marks.get(one.number)
            if mark is not None and mark.plan != one.plan:  # of another plan
                self.store.remove(mark.name)
                self.store.remove(mark.file)
                del self.marks[one.number]
        wanted = STAGES.index(config.stop_after) + 1
        done = sum(one.records for one in own if self._num_done(one.number, made_by) == len(STAGES))
        progress = Progress(done, sum(one.records for one in own), is_shown=config.progress and self.share.index == 0)
        try:
            if plan.is_import:  # all images are read before anything is spent on one
                self._do(1, made_by, progress)
            self._do(wanted, made_by, progress)
        finally:
            progress.close()

    def _sweep(self) -> None:
        """Take away what writers of earlier calls, that were killed, have left."""
        for folder in ("", FOLDER):
            self.store.sweep(folder)
        self.store.sweep(ANSWERS, is_deep=True)

    def _do(self, num_stages: int, made_by: Mapping[StageName, str], progress: Progress) -> None:
        tasks = [
            Task(one, self.marks[one.number].tally.through(num_done) if num_done else Tally())
            for one in self.plan.shards
            if self.share.owns(one.number) and (num_done := self._num_done(one.number, made_by)) < num_stages
        ]
        terms = JobTerms(num_stages, made_by, frozenset(_answered(self.marks.values(), made_by)))
        self.marks |= {mark.number: mark for mark in self.engine.do(tasks, terms, progress)}

    def _num_done(self, number: int, made_by: Mapping[StageName, str]) -> int:
        mark = self.marks.get(number)
        return mark.num_stages(made_by) if mark is not None else 0


def _answered(marks: Iterable[ShardMark], made_by: Mapping[StageName, str]) -> Sequence[StageName]:
    """Stages whose component has answered about some record."""
    return [
        stage
        for place, stage in enumerate(STAGES)
        if any(
            mark.num_stages(made_by) > place
            and mark.tally.done[stage] > mark.tally.faults.get(stage, {}).get("raised", 0)
            for mark in marks
        )
    ]
