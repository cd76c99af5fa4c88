"""Curation from one call: prompts or images in, preference pairs that say why one image is better out.

`curate(config)` plans the records, makes the components, checks that what is in the folder was made by the same ones,
and takes the records through the stages. Everything it finds out is in the folder at once: killed at any moment and
called again, it goes on, and ends with what it would have ended with.
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from tqdm.auto import tqdm

from rpo.config.load import to_yaml
from rpo.curation.components import load_critic, load_editor, load_instructor
from rpo.curation.curate_config import CurateConfig
from rpo.curation.decide import check_rules
from rpo.curation.faults import forget_raised
from rpo.curation.generate import plan_generation
from rpo.curation.pipeline import Pipeline, Stage
from rpo.curation.records import Critic, Editor, Instructor
from rpo.curation.score import CRITIC, ImageSimilarity, Scorer, check_filters, filter_rewards
from rpo.curation.sources import SourcePlan, plan_import
from rpo.curation.stages import (
    critiques_stage,
    decisions_stage,
    edits_stage,
    instructions_stage,
    scores_stage,
    sources_stage,
)
from rpo.curation.store.folder import STAGES, Identity, RunFolder, Share, share_of
from rpo.curation.store.progress import Progress
from rpo.devices import device_named
from rpo.errors import InputError
from rpo.files.text import write_text
from rpo.interrupts import ended_in_order
from rpo.rewards import REWARDS, load_reward, name_of

__all__ = ["Components", "CurateConfig", "curate"]


@dataclass(frozen=True)
class Components:
    """Objects of one's own to use instead of what the configuration names; None leaves it to the configuration."""

    critic: Critic | None = None
    instructor: Instructor | None = None
    editor: Editor | None = None


def curate(config: CurateConfig, *, resume: bool = False, components: Components | None = None) -> Path:
    """Take all records of this process's share through the stages, as far as `stop_after`.

    Args:
        config: The run.
        resume: Go on with a run of the same folder.
        components: Objects of one's own.

    Returns:
        The folder of the run; see `rpo.curation.export` and `rpo.curation.status`.

    Raises:
        ValueError: The folder holds a run and `resume` was not asked for, or one that was made otherwise; or the
            settings, a component or an item of the source cannot be used, or a component raises on everything. Says
            which and why.
        Unavailable: A server or device cannot answer now; resume later.
        OSError: The disk is full; what was found out is kept.

    Example:
        >>> curate(CurateConfig(output="runs/curate"))                   # doctest: +SKIP
        PosixPath('runs/curate')
    """
    check_settings(config)
    share = share_of(config.part, os.environ)
    folder = RunFolder(config.output, share)
    try:
        if folder.stages["sources"].has_own and not resume:
            raise InputError(
                f"{folder.path} holds a run already; give --resume (resume=True) to go on with it, or another output"
            )
        with ended_in_order():
            _run(config, folder, share, components or Components())
    finally:
        folder.close()
    return folder.path


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


def _run(config: CurateConfig, folder: RunFolder, share: Share, components: Components) -> None:
    plan = plan_generation(config.source) if config.source.kind == "generate" else plan_import(config.source)
    if plan.num_duplicates and share.index == 0:
        tqdm.write(f"{plan.num_duplicates} images came again with the same caption; each is done once")
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for item in plan.items:
        groups[item.group or item.id].append(item.id)
    wanted = STAGES.index(config.stop_after) + 1
    stages = list(islice(_stages(config, folder, plan, groups, components), wanted))
    folder.claim({stage.name: identity for stage, identity in stages})
    if share.index == 0:
        write_text(folder.path / "run.yaml", to_yaml(config))
    forget_raised(folder, groups)
    own = [members for group, members in groups.items() if share.owns(group)]
    ids = [record for members in own for record in members]
    done = sum(one in folder.stages["decisions"] for one in ids)
    timings = folder.path / "timings" / f"part-{share.index}.jsonl"
    progress = Progress(timings, done, len(ids), is_shown=config.progress and share.index == 0)
    try:
        if plan.is_import:  # all images are read before anything is spent on one
            Pipeline([stages[0][0]], folder.stages, progress).run(_chunks(own, config.chunk))
        Pipeline([stage for stage, _ in stages], folder.stages, progress).run(_chunks(own, config.chunk))
    except InputError:
        forget_raised(folder, groups)
        raise
    finally:
        progress.close()


def _stages(
    config: CurateConfig,
    folder: RunFolder,
    plan: SourcePlan,
    groups: Mapping[str, Sequence[str]],
    components: Components,
) -> Iterator[tuple[Stage, Identity]]:
    """The stages, and what decides the results of each; the component of one is made when it is asked for."""
    yield sources_stage(folder, plan, config.source.batch_size), plan.identity
    critic = components.critic or load_critic(config.critic, folder.answers)
    yield critiques_stage(folder, critic), critic.identity
    instructor = components.instructor or load_instructor(config.instructor, folder.answers)
    stage = instructions_stage(folder, instructor, instruct_sound=config.instruct_sound)
    yield stage, {**instructor.identity, "instruct_sound": str(config.instruct_sound)}
    editor, seed = components.editor or load_editor(config.editor), config.editor.seed
    tries = config.editor.edits_per_image
    identity = {**editor.identity, "licence": editor.licence, "seed": str(seed), "edits_per_image": str(tries)}
    yield edits_stage(folder, editor, seed, tries), identity
    scorer = _scorer(config, critic)
    scorer.load()
    yield scores_stage(folder, scorer, config), _scores_identity(config)
    yield decisions_stage(folder, config.decide, groups), _texts(asdict(config.decide))


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


def _chunks(groups: Sequence[Sequence[str]], size: int) -> Iterator[list[str]]:
    """Ids in pieces of about `size`, no group being torn apart."""
    chunk: list[str] = []
    for members in groups:
        chunk.extend(members)
        if len(chunk) >= size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
