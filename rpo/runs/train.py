"""A run from a file, by whatever algorithm: load, train, save, judge, report."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from rpo.adapters.loading import load_model
from rpo.config.load import to_yaml
from rpo.data.prompts import read_prompts
from rpo.data.readers import read_pairs
from rpo.errors import InputError
from rpo.evaluation.held_out import HeldOut, Judged
from rpo.files.local_paths import shown_path
from rpo.files.text import write_text
from rpo.models.checkpoint import Checkpoint, refuse_editor
from rpo.models.packaged import expression_of, imports_of
from rpo.models.sharding import refuse_settings
from rpo.models.usual import call_of
from rpo.publishing.measured import measured
from rpo.publishing.model_card import CardFacts, write_model_card
from rpo.reports.training import Findings, write_training_report
from rpo.runs.train_config import (
    DPORunConfig,
    EndpointRunConfig,
    GRPORunConfig,
    RewardGradientRunConfig,
    RewardRunConfig,
    RunConfig,
    ScoreAsActionRunConfig,
    part_of,
)
from rpo.trainers.dpo import DPO
from rpo.trainers.dpo_config import DPOConfig
from rpo.trainers.endpoint import Endpoint
from rpo.trainers.endpoint_config import EndpointConfig
from rpo.trainers.grpo import GRPO
from rpo.trainers.grpo_config import GRPOConfig
from rpo.trainers.identity import lora_preparation
from rpo.trainers.preview import PREVIEWS
from rpo.trainers.reward_gradient import RewardGradient
from rpo.trainers.reward_gradient_config import RewardGradientConfig
from rpo.trainers.score_as_action import ScoreAsAction
from rpo.trainers.score_as_action_config import ScoreAsActionConfig
from rpo.trainers.trainer import Algorithm, Trainer
from rpo.training.log import read_metrics
from rpo.training.loop import TrainResult
from rpo.training.made_with import MadeWith, keep_made_with, made_with
from rpo.training.processes import Processes
from rpo.training.resume import refuse_used

RUN = "run.yaml"
"""The settings of a run, in its folder."""

ONLINE: dict[type[RewardRunConfig], tuple[Any, Any]] = {
    GRPORunConfig: (GRPO, GRPOConfig),
    ScoreAsActionRunConfig: (ScoreAsAction, ScoreAsActionConfig),
    EndpointRunConfig: (Endpoint, EndpointConfig),
    RewardGradientRunConfig: (RewardGradient, RewardGradientConfig),
}
"""By the settings of a run: the algorithm, and its own settings."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended, and where its result is."""

    trained: TrainResult
    saved: Path
    report: Path | None = None
    base: Judged | None = None
    """The checkpoint on the held-out prompts, if it was judged."""
    aligned: Judged | None = None


def run(config: RunConfig, *, resume: bool = False, tell: Callable[[MadeWith], None] = lambda now: None) -> RunResult:
    """Load, train, save, judge base and aligned model on held-out prompts, and write `report.html`.

    Args:
        config: Which algorithm is told by its class; see `rpo.runs.train_config`.
        resume: Continue a killed run in the same folder.
        tell: Called with what the run is made with, before its first update.
    """
    require_deployment(config)
    algorithm = algorithm_of(config)
    folder = Path(algorithm.config.output)
    if not resume:
        refuse_used(folder)
    held_out = None if config.held_out is None else HeldOut(config.held_out)
    learning, model = algorithm.config.learning, config.model
    processes, is_divided = Processes(), learning.sharding != "none"
    refuse_settings(
        learning.sharding, processes=processes.count, frozen_base=model.frozen_base, is_compiled=model.compile
    )
    if is_divided:  # from there it goes to the devices block by block
        model = replace(model, device="cpu")
    trainer = Trainer(load_model(model, mixed_precision=learning.mixed_precision), algorithm)
    if held_out is not None:
        refuse_editor(trainer.run.model, "held_out")
        held_out.refuse_trained(algorithm.previewed().prompts)
    with trainer.claim(resume=resume):
        if trainer.run.processes.is_main:
            now = made_with(type(config).__name__, trainer.identity, processes=trainer.run.processes.count)
            tell(now)
            write_text(folder / RUN, to_yaml(config))
            keep_made_with(folder, now)
        trained = trainer.train(resume=resume)
        saved = trainer.save()
    result = RunResult(trained, saved)
    return _judged_and_reported(trainer, config, result, held_out) if trainer.run.draws else result


def require_deployment(config: RunConfig) -> None:
    """Refuse to judge a distilled checkpoint by the pipeline's usual steps, which are those of the base."""
    held_out, model = config.held_out, config.model
    if held_out is None or not (model.assistant or model.allow_distilled):
        return
    if missing := [f"held_out.{one}" for one in ("num_steps", "guidance_scale") if getattr(held_out, one) is None]:
        raise InputError(
            f"{' and '.join(missing)} is not given, but the checkpoint was distilled and must be judged as it is used; "
            "expected the steps and the guidance of deployment, such as held_out.num_steps=4 held_out.guidance_scale=1"
        )


def algorithm_of(config: RunConfig) -> Algorithm[Any]:
    """The algorithm of a run's settings, with its data."""
    if isinstance(config, DPORunConfig):
        data = config.data
        if not data.source:
            raise InputError(
                "data.source is empty; give a folder, file or data set of preference pairs: data.source=PATH"
            )
        pairs = read_pairs(
            data.source,
            split=data.split,
            limit=data.limit,
            streaming=data.streaming,
            allow_size_mismatch=data.allow_size_mismatch,
            skip_faulty=data.skip_faulty,
        )
        return DPO(pairs, part_of(config, DPOConfig))
    assert isinstance(config, RewardRunConfig)
    algorithm, settings = ONLINE[type(config)]
    own = part_of(config, settings)
    return algorithm(config.rewards, read_prompts(config.prompts, seed=own.seed), own)


def _card(trainer: Trainer, config: RunConfig, base: Judged, aligned: Judged) -> CardFacts:
    """The model's card, with what was measured on held-out prompts, and images of some of them."""
    held_out, model, card = config.held_out, trainer.run.model, replace(trainer.card(), data=data_in_words(config))
    assert held_out is not None
    if isinstance(model, Checkpoint):
        drawn = {"num_steps": held_out.num_steps, "guidance_scale": held_out.guidance_scale, "eta": held_out.eta}
        card = replace(card, call=call_of(model, **drawn))
    if packaged := expression_of(config.model.source):  # whose folder is elsewhere for everybody
        card = replace(card, base_model=None, base_expression=packaged, imports=imports_of(config.model.source))
    return measured(card, base, aligned, held_out.reward)


def data_in_words(config: RunConfig) -> str:
    """What a run learns from, without a path of this machine."""
    if isinstance(config, DPORunConfig):
        return f"preference pairs, `{shown_path(config.data.source)}`."
    assert isinstance(config, RewardRunConfig)
    rewards = " and ".join(f"`{shown_path(name)}` × {weight:g}" for name, weight in config.rewards.items())
    return f"the model's own images of the prompts `{shown_path(config.prompts)}`, by the reward {rewards}."


def _judged_and_reported(trainer: Trainer, config: RunConfig, result: RunResult, held_out: HeldOut | None) -> RunResult:
    is_main, seconds = trainer.run.processes.is_main, {"train": float(read_metrics(trainer.folder)[-1]["seconds"])}
    progress, began, base, aligned = trainer.run.shows_progress, time.perf_counter(), None, None
    if held_out is not None:
        policy, model = trainer.run.policy, trainer.run.model
        with policy.deployed(), policy.reference():
            base = held_out.judge(model, progress="base" if progress else None)
        with policy.deployed():
            aligned = held_out.judge(model, progress="aligned" if progress else None)
        seconds["judge base and aligned model"] = time.perf_counter() - began
        card = _card(trainer, config, base, aligned)
        if is_main:
            write_model_card(result.saved, card)
        if progress:
            tqdm.write(aligned.gain_in_words(base))
    if not (config.report and is_main):
        return RunResult(result.trained, result.saved, None, base, aligned)
    findings = Findings(
        method=trainer.algorithm.title,
        folder=trainer.folder,
        previews=trainer.folder / PREVIEWS,
        previewed=trainer.algorithm.previewed().captions,
        saved=result.saved,
        base_source=config.model.source,
        preparation=lora_preparation(trainer.run.model),
        updates=result.trained.updates,
        stopped_because=result.trained.stopped_because,
        base=base,
        aligned=aligned,
        settings=to_yaml(config),
        seconds=seconds,
    )
    page = write_training_report(findings, trainer.folder / "report.html")
    if progress:
        tqdm.write(f"\nresult: {result.saved}\nreport: {page}  (open it in a browser)")
    return RunResult(result.trained, result.saved, page, base, aligned)
