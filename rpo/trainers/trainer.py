"""The trainer of every algorithm: it owns what is not the algorithm's.

A `Trainer` has an `Algorithm`. Model, policy, folder, plan, checks, previews, the loop, resuming, saving and publishing
are here, once; an algorithm says what micro-batches are and what is descended. Its file shows its whole step.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Generic, TypeVar, final

import torch
from tqdm.auto import tqdm

from rpo.config.load import to_yaml
from rpo.files.text import write_text
from rpo.models.base import DiffusionModel
from rpo.publishing.publish import CardFacts, PublishPlan, publish, write_model_card
from rpo.trainers.checks.preflight import Check, preflight
from rpo.trainers.checks.prepared import computes_in, prepared_model
from rpo.trainers.identity import base_identity, card_of, settings_identity
from rpo.trainers.policy import Policy, divide, make_policy
from rpo.trainers.preview import PREVIEWS, Preview, PreviewOf
from rpo.trainers.settings import TrainingConfig
from rpo.training.checkpoint import checkpoints
from rpo.training.loop import TrainResult, describe, fit
from rpo.training.loop_config import LoopConfig
from rpo.training.processes import Processes, ended_together
from rpo.training.resume import claimed
from rpo.training.state import Stateful
from rpo.types import StepOutput

B = TypeVar("B")
OnUpdate = Callable[[int, dict[str, float]], object]


@dataclass(frozen=True)
class Run:
    """What an algorithm is given to work with."""

    model: DiffusionModel
    policy: Policy
    processes: Processes
    config: TrainingConfig
    base: Mapping[str, str]
    """What identifies the checkpoint, from before anything was trained."""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.output)

    @property
    def draws(self) -> bool:
        """Whether this process makes the forwards that one is enough for: with a divided denoiser, all make them."""
        return self.processes.is_main or self.config.learning.sharding != "none"

    @property
    def shows_progress(self) -> bool:
        """Whether this process tells a person how it goes."""
        return self.processes.is_main and self.config.learning.progress


class Algorithm(ABC, Generic[B]):
    """What micro-batches are, and what is descended; a subclass gives at least what is abstract here.

    Attributes:
        run: What it works with, from `start` on.
        config: Its settings.
        unit: What a micro-batch is made of, in the plural.
    """

    run: Run
    unit = "samples"
    draws_ahead = False
    """Whether a micro-batch depends on nothing that an update changes, so that it may be made during the one before."""

    def __init__(self, config: TrainingConfig):
        """Keep the settings."""
        self.config = config

    @property
    def title(self) -> str:
        """What a person calls it."""
        return type(self).__name__

    def start(self, run: Run) -> None:
        """Take what there is to work with, and refuse data that cannot be trained on."""
        self.run = run

    @property
    @abstractmethod
    def division(self) -> tuple[int, int]:
        """(size of a micro-batch, micro-batches per update), of this process."""

    @abstractmethod
    def batches(self, first_update: int) -> Iterator[B]:
        """This process's micro-batches from an update on, without end."""

    @abstractmethod
    def names(self, batch: B) -> Sequence[str]:
        """What a person calls the samples of a micro-batch."""

    @abstractmethod
    def loss(self, batch: B) -> StepOutput:
        """The loss of a micro-batch, as a mean over its samples, and what to log."""

    def plan(self) -> list[str]:
        """What a person should know before the run, line by line."""
        return []

    def prepare(self) -> None:
        """What is done once before the first update, such as encoding."""

    def running(self) -> AbstractContextManager[None]:
        """Around all that comes after `prepare`."""
        return nullcontext()

    def checks(self) -> list[Check]:
        """What must hold for a run to learn; asked before its first update."""
        return []

    def after(self, update: int, metrics: dict[str, float]) -> None:
        """Called on every process after every update."""

    def guard(self, metrics: dict[str, float]) -> str | None:
        """Why training ends here, or nothing."""
        return None

    @property
    def state(self) -> dict[str, Stateful]:
        """What else has to survive a kill, by name."""
        return {}

    @property
    def identity(self) -> dict[str, str]:
        """What decides about the result beside settings and checkpoint."""
        return {}

    @abstractmethod
    def previewed(self) -> PreviewOf:
        """What the image grids show, and how it is drawn."""


@final
class Trainer:
    """Aligns a pipeline by an algorithm. Afterwards the pipeline itself carries the adapter, active.

    A further trainer on the same pipeline goes on from that adapter, as from any LoRA that a pipeline carries; save
    first what is to be kept by itself.

    Example:
        >>> trainer = Trainer(pipe, DPO(read_pairs("pairs"), DPOConfig(output="runs/mine")))    # doctest: +SKIP
        >>> trainer.train()                                                                     # doctest: +SKIP
        >>> trainer.save()                                                                      # doctest: +SKIP

    Attributes:
        run: Model, policy, settings and folder.
        algorithm: What is trained by.
    """

    def __init__(self, pipe: Any, algorithm: Algorithm[Any]):
        """Check everything that can be checked before the first update, and add the adapter.

        Args:
            pipe: The pipeline to train, on the device to train on; or a `Checkpoint` or other `DiffusionModel`.
            algorithm: With its data and settings; it serves one trainer.

        Raises:
            InputError: If pipeline, data or settings cannot be trained with; says which and why.
        """
        config = algorithm.config
        model = prepared_model(pipe, config.learning)
        base = base_identity(model)
        policy = make_policy(model, config.adapter, seed=config.seed)
        self.run = Run(model, policy, Processes(), config, base)
        divide(policy, config.learning, self.run.processes)
        self.algorithm = algorithm
        algorithm.start(self.run)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.run.folder

    @cached_property
    def loop(self) -> LoopConfig:
        """The settings of the loop, as they come to."""
        learning = self.run.config.learning
        _, accumulate = self.algorithm.division
        is_scaled = computes_in(self.run.model, torch.float16)
        return learning.loop(accumulate=accumulate, seed=self.run.config.seed, scale_loss=is_scaled)

    def plan(self) -> str:
        """What the run comes to, in a few lines."""
        run, size = self.run, self.algorithm.division[0]
        trained = sum(parameter.numel() for parameter in run.policy.parameters)
        return "\n".join(
            [
                f"{self.algorithm.title}, {run.config.adapter.train}: {trained:,} parameters on {run.model.device}",
                f"  {describe(self.loop, size, run.processes.count, unit=self.algorithm.unit)}",
                *(f"  {line}" for line in (run.policy.note, *self.algorithm.plan()) if line),
            ]
        )

    def claim(self, *, resume: bool) -> AbstractContextManager[None]:
        """Inside, the run's folder belongs to this run; refused before anything in it is touched."""
        return claimed(self.folder, self.loop, self.identity, self.run.processes, resume=resume)

    def train(self, *, resume: bool = False, on_update: OnUpdate | None = None) -> TrainResult:
        """Run all updates.

        Args:
            resume: Continue a killed run in the same folder; on the CPU it ends in the same weights, bit for bit.
            on_update: Called on the main process after every update with the number of updates done and the metrics of
                the last, by the names of `metrics.jsonl`. It may draw random numbers without changing the run.

        Returns:
            How it ended; `stopped_because` is set if a guard ended it early.

        Raises:
            PreflightError: The run cannot learn; said before the first update.
            RewardError: A reward fails, or too often; names the prompt, saves the image, the last good state is kept.
            NonFiniteLossError: A loss is not finite; names the records, and the last good state is kept.
            InputError: The folder is in use, or holds another run already; says which and what differs.
        """
        run, algorithm = self.run, self.algorithm
        run.policy.require_in_place()
        with ended_together(run.processes), self.claim(resume=resume):
            if run.shows_progress:
                tqdm.write(self.plan())
            algorithm.prepare()
            run.model.denoiser.train(run.config.adapter.gradient_checkpointing)  # which diffusers does in training mode
            try:
                with algorithm.running():
                    preview = self._preview()
                    if not (resume and checkpoints(self.folder)):
                        if run.config.preflight:
                            say = tqdm.write if run.shows_progress else None
                            preflight(algorithm.checks, say=say, device=run.model.device)
                        with run.policy.deployed():
                            preview(0)
                    return self._fit(preview, on_update if run.processes.is_main else None, resume=resume)
            finally:
                run.model.denoiser.eval()

    def _fit(self, preview: Callable[[int], None], on_update: OnUpdate | None, *, resume: bool) -> TrainResult:
        algorithm = self.algorithm

        def after(update: int, metrics: dict[str, float]) -> None:
            algorithm.after(update, metrics)
            with self.run.policy.deployed():
                preview(update)
            if on_update is not None:
                on_update(update, metrics)

        return fit(
            algorithm.batches,
            algorithm.loss,
            self.run.policy.parameters,
            self.loop,
            folder=self.folder,
            names=algorithm.names,
            draws_ahead=algorithm.draws_ahead,
            resume=resume,
            state=algorithm.state,
            identity=self.identity,
            on_update=after,
            guard=algorithm.guard,
        )

    def _preview(self) -> Callable[[int], None]:
        every = self.run.config.preview_every if self.run.draws else 0
        if not every:
            return lambda update: None
        place = self.folder / PREVIEWS if self.run.processes.is_main else None
        return Preview(self.run.model, self.algorithm.previewed(), place, every=every, seed=self.run.config.seed)

    def save(self, folder: str | PathLike[str] | None = None) -> Path:
        """Write what was trained, with a model card and the settings; a LoRA is read back and compared.

        Args:
            folder: Where to; `lora` (or `pipeline`) in the run's folder by default.

        Returns:
            The folder: `pipe.load_lora_weights(folder)` reads it.

        Raises:
            InputError: If the file of a LoRA does not reproduce the live model, or the adapter changes nothing.
        """
        run, config = self.run, self.run.config
        run.policy.require_in_place()
        place = Path(folder) if folder else self.folder / ("lora" if config.adapter.train == "lora" else "pipeline")
        with ended_together(run.processes):
            card = self.card() if run.draws else None  # first, as all processes do it together
            if run.processes.is_main and card is not None:
                run.policy.save(place)
                write_text(place / "training_config.yaml", to_yaml(config, for_others=True))
                write_model_card(place, card)
            elif run.draws:
                run.policy.help_save()
        return place

    def card(self) -> CardFacts:
        """What is known of what was trained, for its model card; `replace` adds to it."""
        run, algorithm = self.run, self.algorithm
        is_lora = run.config.adapter.train == "lora"
        return card_of(run.model, algorithm.title, run.config, is_lora=is_lora, identity=algorithm.identity)

    def publish(self, repo_id: str, *, push: bool = False, private: bool = True) -> PublishPlan:
        """Save and say what publishing would upload; upload it with `push=True`.

        Args:
            repo_id: "owner/name" on the Hugging Face Hub.
            push: Really upload; needs `hf auth login`.
            private: Whether a new repository is private.
        """
        return publish(self.save(), repo_id, push=push, private=private)

    @cached_property
    def identity(self) -> dict[str, str]:
        """What decides about the result; how long a run is, where it lies and when it ends early may change."""
        free = {"learning", "output", "preview_every", "preflight", "cache_folder", "encode_ahead"}
        free |= {"rollout.max_failed", "monitor"}
        return settings_identity(self.run.config, free) | dict(self.run.base) | self.algorithm.identity
