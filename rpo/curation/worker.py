"""A worker does shards: every model is loaded once, and each shard is a function of its plan and the run's settings.

    a planned shard → sources → critiques → instructions → edits → scores → decisions → a sealed shard

It talks to nobody but the place of the run and the servers that the settings name. So it may be this process, one of
several of this machine, or an actor of a cluster (`rpo.curation.engines`), and may be killed at any moment.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from math import fsum
from typing import final

from PIL.Image import Image

from rpo.curation.components import load_critic, load_editor, load_instructor
from rpo.curation.curate_config import CurateConfig
from rpo.curation.generate import Drawer
from rpo.curation.pipeline import Observer, Pipeline, Stage
from rpo.curation.records import Critic, Editor, Instructor, Outcome, Scores, fault_in, read_row, result_of
from rpo.curation.score import CRITIC, ImageSimilarity, Scorer, filter_rewards
from rpo.curation.sources import Planned, PlannedShard, read_planned
from rpo.curation.stages import (
    critiques_stage,
    decisions_stage,
    edits_stage,
    instructions_stage,
    scores_stage,
    sources_stage,
)
from rpo.curation.store.address import Store
from rpo.curation.store.mark import STAGES, Identity, ShardMark, StageName, Tally, mark_of
from rpo.curation.store.run import identity_hash
from rpo.curation.store.shard import Shard, load, seal
from rpo.curation.vlm.answers import AnswerCache
from rpo.devices import device_named
from rpo.errors import InputError
from rpo.rewards import REWARDS, load_reward, name_of

Draw = Callable[[Sequence[Planned]], Sequence[Image]]


@dataclass(frozen=True)
class Components:
    """Objects of one's own to use instead of what the configuration names; None leaves it to the configuration."""

    critic: Critic | None = None
    instructor: Instructor | None = None
    editor: Editor | None = None


@dataclass(frozen=True)
class CurationJob:
    """What every worker of a run is made of."""

    config: CurateConfig
    components: Components = field(default_factory=Components)
    source: Mapping[str, str] = field(default_factory=dict)
    """What decides the images, as the plan says."""


@dataclass(frozen=True)
class Task:
    """A shard to do."""

    planned: PlannedShard
    before: Tally = field(default_factory=Tally)
    """What was known of it when it was handed out."""


@dataclass(frozen=True)
class JobTerms:
    """What all workers of a run keep to."""

    num_stages: int
    """How many of the stages are to be done."""
    made_by: Mapping[StageName, str]
    """The hash of what each stage is made by, which must be what a worker makes it by."""
    answered: frozenset[StageName] = frozenset()
    """Stages whose component is known to work."""


@final
class Worker:
    """Does shards, one after the other.

    Attributes:
        identities: Everything that decides the results of each stage.
        overlaps: Whether several shards at a time are done sooner than one after the other.
    """

    def __init__(self, job: CurationJob, *, draw: Draw | None = None) -> None:
        """Load every component that the stages need, up to the last that is wanted.

        Args:
            draw: What the images come from, where it is at hand.
        """
        config = job.config
        self._store = Store(config.output)
        self._answers = AnswerCache(self._store)
        wanted = STAGES.index(config.stop_after) + 1
        found = list(islice(_stages(job, draw, self._answers), wanted))
        self._stages = [stage for stage, _ in found]
        self.identities: dict[StageName, Identity] = {stage.name: dict(identity) for stage, identity in found}
        self._made_by: dict[StageName, str] = {name: identity_hash(one) for name, one in self.identities.items()}
        self._answered = set[StageName]()
        self.overlaps = Pipeline(self._stages, lambda shard: None).overlaps

    def do(self, tasks: Iterable[Task], terms: JobTerms, observer: Observer | None = None) -> list[ShardMark]:
        """Take shards through the first stages, and seal them.

        Args:
            observer: Hears of every record.

        Returns:
            The marks of the shards.
        """
        self._require(terms.made_by)
        self._answered.update(terms.answered)
        marks: list[ShardMark] = []

        def sealed(shard: Shard) -> None:
            self._answers.pack(shard.name)
            marks.append(seal(self._store, shard, self._made_by, tally_of(shard)))

        def opened() -> Iterator[Shard]:
            for task in tasks:
                found = self._opened(task.planned, terms)
                if isinstance(found, ShardMark):
                    marks.append(found)
                else:
                    yield found

        Pipeline(
            self._stages[: terms.num_stages],
            sealed,
            observer=observer,
            answered=self._answered,
            within=lambda shard: self._answers.of(shard.name),
        ).run(opened())
        return marks

    def _opened(self, planned: PlannedShard, terms: JobTerms) -> Shard | ShardMark:
        """A shard as far as it is done; its mark if that is far enough: another worker may have been here."""
        mark = mark_of(self._store, planned.number)
        if mark is None or mark.plan != planned.plan:
            return planned.opened()
        num_done = mark.num_stages(terms.made_by)
        if num_done >= terms.num_stages:
            return mark
        if not num_done:
            return planned.opened(mark)
        try:
            return load(self._store, mark, num_done)
        except InputError:
            if mark_of(self._store, planned.number) == mark:
                raise
            return self._opened(planned, terms)  # it was sealed anew in between

    def _require(self, made_by: Mapping[StageName, str]) -> None:
        for stage, digest in self._made_by.items():
            if digest != made_by[stage]:
                raise InputError(
                    f"a worker makes stage '{stage}' by {dict(self.identities[stage])}, which is not what the run "
                    "makes it by; expected one way for all records of a run; give all machines the same files and "
                    "versions"
                )


def _stages(job: CurationJob, draw: Draw | None, answers: AnswerCache) -> Iterator[tuple[Stage, Identity]]:
    """The stages, and what decides the results of each; the component of one is made when it is asked for."""
    config, given = job.config, job.components
    is_drawn = config.source.kind == "generate"
    draw = draw or (Drawer(config.source) if is_drawn else read_planned)
    yield sources_stage(draw, config.source.batch_size), job.source
    critic = given.critic or load_critic(config.critic, answers)
    yield critiques_stage(critic), critic.identity
    instructor = given.instructor or load_instructor(config.instructor, answers)
    stage = instructions_stage(instructor, instruct_sound=config.instruct_sound)
    yield stage, {**instructor.identity, "instruct_sound": str(config.instruct_sound)}
    editor, seed = given.editor or load_editor(config.editor), config.editor.seed
    tries = config.editor.edits_per_image
    identity = {**editor.identity, "licence": editor.licence, "seed": str(seed), "edits_per_image": str(tries)}
    yield edits_stage(editor, seed, tries), identity
    scorer = _scorer(config, critic)
    scorer.load()
    yield scores_stage(scorer, config), _scores_identity(config)
    yield decisions_stage(config.decide), _texts(asdict(config.decide))


def _texts(settings: Mapping[str, object]) -> Identity:
    """Settings as texts; one that is a text stays the object that it is, which knows how it was written."""
    return {name: value if isinstance(value, str) else str(value) for name, value in settings.items()}


def _scorer(config: CurateConfig, critic: Critic) -> Scorer:
    device = str(device_named("auto"))
    evaluation = load_reward(config.evaluation) if config.evaluation else None
    model = config.decide.similarity_model
    similarity = ImageSimilarity(model, device) if model else None
    voice = critic if CRITIC in config.decide.rewards else None
    return Scorer(filter_rewards(config.decide), evaluation, similarity, device, voice)


def _scores_identity(config: CurateConfig) -> Identity:
    return {
        **{f"reward {name_of(name)}": REWARDS.get(name, name_of(name)) for name in config.decide.rewards},
        "evaluation": config.evaluation and name_of(config.evaluation),
        "similarity_model": config.decide.similarity_model,
        "orderings": config.decide.orderings,
    }


def tally_of(shard: Shard) -> Tally:
    """What has come of a shard's records, in numbers."""
    done, faults = dict[str, int](), dict[str, dict[str, int]]()
    for stage in STAGES[: shard.num_through]:
        rows = shard.rows[stage].values()
        done[stage] = len(rows)
        if found := Counter(fault.kind for row in rows if (fault := fault_in(row)) is not None):
            faults[stage] = dict(sorted(found.items()))
    kept, dropped, gaps = Counter[str](), Counter[str](), list[float]()
    for record in shard.ids if shard.num_through == len(STAGES) else ():
        for outcome in read_row("decisions", shard.rows["decisions"][record]):
            if outcome.chosen:
                kept[outcome.label] += 1
                gaps += _evaluation_gap(shard, outcome)
            else:
                dropped[str(outcome.reason)] += 1
    signs = Counter((gap > 0) - (gap < 0) for gap in gaps)
    evaluation = {"better": signs[1], "equal": signs[0], "worse": signs[-1], "gap": fsum(gaps)} if gaps else {}
    labels, reasons = (dict(sorted(found.items())) for found in (kept, dropped))
    return Tally(done, faults, dict(shard.seconds), labels, reasons, evaluation)


def _evaluation_gap(shard: Shard, outcome: Outcome) -> list[float]:
    """Score of the chosen image minus that of the rejected one by the evaluating reward; empty if it was not asked."""
    found: list[float] = []
    for name in (outcome.chosen, outcome.rejected):
        record, _, kind = name.partition("/")
        scores = result_of(shard, "scores", record)
        if not isinstance(scores, Scores) or kind not in scores.evaluation:
            return []
        found.append(scores.evaluation[kind])
    return [found[0] - found[1]]
