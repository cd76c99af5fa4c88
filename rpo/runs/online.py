"""How an online run from a file loads, trains, saves, measures and reports."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from tqdm.auto import tqdm

from rpo.config import to_yaml
from rpo.data.prompts import SHAPES, read_prompts
from rpo.models.checkpoint import Checkpoint
from rpo.models.config import load_model
from rpo.runs.online_config import OnlineRunConfig
from rpo.runs.online_report import OnlineFindings, write_online_report
from rpo.shapes.evaluate import Measurement, evaluate, format_accuracies, held_out_prompts
from rpo.shapes.evaluation import Sampling
from rpo.text import write_text
from rpo.trainers.grpo_config import GRPOConfig
from rpo.trainers.online import OnlineRun
from rpo.trainers.rollouts.preview import IMAGES, PREVIEWS
from rpo.trainers.score_as_action_config import ScoreAsActionConfig
from rpo.training.log import read_metrics
from rpo.training.loop import TrainResult
from rpo.training.resume import refuse_used

Training = TypeVar("Training", GRPOConfig, ScoreAsActionConfig)


class OnlineTrainer(Protocol):
    """A trainer that draws what it learns from."""

    run: OnlineRun

    @property
    def folder(self) -> Path:
        """The run's folder."""
        ...

    def train(self, *, resume: bool = False) -> TrainResult:
        """Run all updates."""
        ...

    def save(self) -> Path:
        """Write what was trained."""
        ...


@dataclass(frozen=True)
class RunResult:
    """How a run ended, and where its result is."""

    trained: TrainResult
    saved: Path
    report: Path | None
    measured: Measurement | None
    """Verified accuracy of base and aligned model, where the model is that of shapes."""


def run_online(
    config: OnlineRunConfig,
    training: Training,
    trainer_of: Callable[[Checkpoint, Mapping[str, float], list[str], Training], OnlineTrainer],
    *,
    resume: bool,
) -> RunResult:
    """Load, train, save, measure on `shapes`, and write `report.html`."""
    training = replace(training, folder=config.output) if config.output else training
    if not resume:
        refuse_used(Path(training.folder))
    prompts = read_prompts(config.prompts, seed=training.seed)
    return _train_and_report(
        trainer_of(load_model(config.model), config.rewards, prompts, training), config, resume=resume
    )


def _train_and_report(trainer: OnlineTrainer, config: OnlineRunConfig, *, resume: bool) -> RunResult:
    source, settings = config.model.source, to_yaml(config)
    is_main = trainer.run.processes.is_main
    with trainer.run.claim(resume=resume):
        if is_main:
            write_text(trainer.folder / "run.yaml", settings)
        trained = trainer.train(resume=resume)
        saved = trainer.save()
    if not (config.report and is_main):
        return RunResult(trained, saved, None, None)
    began = time.perf_counter()
    measured = _measure(trainer.run, config.evaluate_images) if source == SHAPES and config.evaluate_images else None
    seconds = {"train": float(read_metrics(trainer.folder)[-1]["seconds"])}
    if measured is not None:
        seconds["evaluate base and aligned model"] = time.perf_counter() - began
    page = trainer.folder / "report.html"
    result = RunResult(trained, saved, page, measured)
    write_online_report(_findings(trainer.run, result, source=source, settings=settings, seconds=seconds), page)
    if trainer.run.settings.loop.progress:
        if measured is not None:
            tqdm.write("\n" + format_accuracies(measured, seed=trainer.run.settings.seed))
        tqdm.write(f"\nresult: {saved}\nreport: {page}  (open it in a browser)")
    return result


def sampling_of(run: OnlineRun) -> Sampling:
    """How base and aligned model are drawn to compare them: as suits the base best, so that no gain is a sampler's.

    What was learnt at noise level 1 may be sampled so; what was learnt at another, only as it was drawn.
    """
    rollout = run.settings.rollout
    if rollout.eta in (0.0, 1.0):
        return Sampling(run.settings.seed)
    return Sampling(run.settings.seed, guidance_scale=rollout.guidance_scale, eta=rollout.eta)


def _measure(run: OnlineRun, images: int) -> Measurement:
    settings = run.settings
    held_out, sampling = held_out_prompts(images, settings.seed), sampling_of(run)
    size, progress = settings.rollout.batch_size, settings.loop.progress
    with run.policy.reference():
        base = evaluate(run.model, held_out, sampling, batch_size=size, progress="base model" if progress else None)
    aligned = evaluate(run.model, held_out, sampling, batch_size=size, progress="aligned model" if progress else None)
    return Measurement(base, aligned)


def _findings(
    run: OnlineRun, result: RunResult, *, source: str, settings: str, seconds: Mapping[str, float]
) -> OnlineFindings:
    folder, measured = run.settings.folder, result.measured
    return OnlineFindings(
        method=run.settings.method,
        folder=folder,
        previews=folder / PREVIEWS,
        preview_columns=IMAGES,
        saved=result.saved,
        base_expression="rpo.shapes.path()" if source == SHAPES else json.dumps(source),
        updates=result.trained.updates,
        stopped_because=result.trained.stopped_because,
        rewards=dict(run.rollouts.rewards.weights),
        prompts=run.rollouts.prompts,
        base=None if measured is None else measured.base,
        aligned=None if measured is None else measured.aligned,
        settings=settings,
        seconds=seconds,
        seed=run.settings.seed,
    )
