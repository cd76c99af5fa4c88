"""Everything that can be found out about a trainer before it trains: more than the preflight, which only refuses.

Each look is guarded, so that one fault hides no other. Weights, random numbers and the run's folder are afterwards what
they were; what an algorithm draws and scores is a small rollout of its own.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rpo.data.encodings import latent_requests
from rpo.data.transform import PairTransform
from rpo.errors import SURROUNDINGS, InputError
from rpo.models.checkpoint import Checkpoint
from rpo.rewards import WeightedRewards
from rpo.sampling.step import predict
from rpo.trainers.checks.adapter import adapter_checks, drawn
from rpo.trainers.checks.first_step import FirstBatch, first_step, starts_at_reference
from rpo.trainers.checks.parts import part_looks
from rpo.trainers.checks.preference import preference_checks
from rpo.trainers.checks.preflight import Check
from rpo.trainers.checks.records import captions, record_checks
from rpo.trainers.checks.scores import score_checks
from rpo.trainers.dpo import DPO
from rpo.trainers.pairs.errors import denoise
from rpo.trainers.rollouts.algorithm import OnlineAlgorithm
from rpo.trainers.rollouts.prompts import Prompts
from rpo.trainers.trainer import Trainer
from rpo.training.randomness import undisturbed_randomness
from rpo.types import Images

Look = Callable[[], Iterable[Check]]

PROMPTS, IMAGES = 2, 4
"""Of the rollout whose first micro-batch is looked at."""


def examine(trainer: Trainer) -> list[Check]:
    """All checks of a trainer, whatever fails; takes seconds on `shapes`, and about a minute on a GPU.

    Example:
        >>> [check for check in examine(trainer) if not check.passed]        # doctest: +SKIP
    """
    with tempfile.TemporaryDirectory() as folder:
        return [check for name, look in looks(trainer, Path(folder)).items() for check in guarded(name, look)]


def guarded(name: str, look: Look) -> Iterator[Check]:
    """The checks of one look; what it raises about the input, the disk or memory is a failed one of its name."""
    try:
        yield from look()
    except (InputError, OSError, torch.OutOfMemoryError) as error:
        if isinstance(error, OSError) and error.errno not in SURROUNDINGS:
            raise  # a defect of rpo keeps its traceback
        advice = "lower learning.micro_batch, or see `rpo plan`" if isinstance(error, torch.OutOfMemoryError) else ""
        yield Check(name, False, " ".join(str(error).split()), advice)


def looks(trainer: Trainer, folder: Path) -> dict[str, Look]:
    """What there is to look at, by name; the adapter's file goes into a folder."""
    model, algorithm, shown = trainer.run.model, trainer.algorithm, trainer.algorithm.previewed()
    found, prompt = dict[str, Look](), shown.rows[0]
    if isinstance(model, Checkpoint):
        canvas = shown.canvas or model.canvas

        def picture() -> Images:
            if isinstance(algorithm, DPO):
                return _chosen(algorithm)
            return drawn(model, prompt, shown.num_steps, canvas=canvas)

        found = part_looks(model, picture, num_steps=shown.num_steps, canvas=canvas)
        found["captions"] = lambda: [captions(model, shown.prompts)]
    if isinstance(algorithm, DPO):
        found["pairs"] = lambda: record_checks(algorithm.pairs, algorithm.sizes, algorithm.share.at_once)
    found["preflight"] = algorithm.checks
    if isinstance(algorithm, DPO):
        found["first step"] = lambda: _pairs(algorithm)
    elif isinstance(algorithm, OnlineAlgorithm):
        found["first step"] = lambda: _rollout(algorithm)
    if isinstance(model, Checkpoint):
        found["adapter"] = lambda: adapter_checks(trainer.run, model, prompt, folder)
    return {name: _undisturbed(trainer, look) for name, look in found.items()}


def _chosen(algorithm: DPO) -> Images:
    """The first of the images that are preferred, as it is trained on."""
    buckets = algorithm.sizes.buckets
    how = PairTransform(buckets.canvases[buckets.of_pair[0]])
    request, _ = latent_requests(algorithm.pairs[0], how, how.draw(seed=0, pair_index=0, draw_index=0))
    return request.load()[None]


def _undisturbed(trainer: Trainer, look: Look) -> Look:
    def looked() -> Iterator[Check]:
        with undisturbed_randomness(trainer.run.model.device):
            yield from look()

    return looked


def _pairs(algorithm: DPO) -> Iterator[Check]:
    """The first micro-batch; running statistics see nothing of it."""
    batch, statistics = next(algorithm.batches(0)), algorithm.statistics
    algorithm.statistics = None if statistics is None else statistics.fresh()
    first = FirstBatch(
        algorithm.run, lambda: algorithm.loss(batch).loss, lambda: denoise(algorithm.model, batch).noise_pred
    )
    try:
        yield starts_at_reference(first)
        yield from preference_checks(algorithm, batch)
        yield from first_step(first)
    finally:
        algorithm.statistics = statistics


def _rollout(algorithm: OnlineAlgorithm) -> Iterator[Check]:
    """The first micro-batch of a small rollout, by an algorithm of its own on the same policy."""
    rollouts, run = algorithm.collector.rollouts, algorithm.run
    small = _small(algorithm, rollouts.rewards, rollouts.prompts)
    small.start(run)
    small.collector.rollouts.failed.evidence = None  # a run's folder is not written to
    batch, guidance = next(small.batches(0)), algorithm.config.guidance_scale
    assert small.collector.rollout is not None
    yield from score_checks(small.collector.rollout, rollouts.rewards.weights, are_normalised=algorithm.compares_each)
    first = FirstBatch(
        run,
        lambda: small.loss(batch).loss,
        lambda: predict(run.model, batch.x_t, batch.t, batch.conditioning, guidance_scale=guidance),
    )
    yield starts_at_reference(first)
    yield from first_step(first)


def _small(algorithm: OnlineAlgorithm, rewards: WeightedRewards, prompts: Prompts) -> OnlineAlgorithm:
    config: Any = algorithm.config
    prompts_drawn = min(config.rollout.prompts, PROMPTS) * algorithm.run.processes.count
    rollout = config.rollout.of_few(prompts_drawn, min(config.rollout.images_per_prompt, IMAGES))
    changes: dict[str, Any] = {"rollout": rollout}
    changes["steps"] = replace(config.steps, minibatches=1, passes=1, keep_graph=False)
    if hasattr(config, "value"):
        changes["value"] = replace(config.value, pretrain_rollouts=0, updates=0)
    make: Any = type(algorithm)
    return make(rewards, prompts, replace(config, **changes))
