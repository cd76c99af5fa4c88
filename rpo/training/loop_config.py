"""The settings of the loop, and what they come to."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from rpo.config.ranges import (
    BelowOne,
    Count,
    LearningRate,
    NotNegative,
    Positive,
    PositiveOrInf,
    Range,
    Seed,
    Text,
    WholeNumber,
)
from rpo.config.settings import settings
from rpo.errors import InputError
from rpo.from_environment import as_written
from rpo.training.optimizer import OptimizerName


@settings
class LearningSpeed:
    """How long, how fast and how safely something is trained; the defaults suit a LoRA on a tiny model."""

    updates: Count = 100
    """Optimizer steps in all. 100 to 300 for `shapes`, 500 to 2000 for Stable Diffusion."""
    learning_rate: LearningRate = 3e-4
    """Peak of the learning rate. 1e-4 to 5e-4 for a LoRA, 1e-6 to 2e-5 for full fine-tuning; too high breaks the images
    before the loss shows it."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """What the learning rate does after the warm-up: stay, or fall to zero at the end. `constant` lets a run be
    prolonged later; the others gain a little at the end of a run of known length."""
    warmup_updates: WholeNumber = 0
    """Updates in which the learning rate rises to its peak. 0 to 10 % of `updates`; helps against an early spike."""
    max_grad_norm: PositiveOrInf = 1.0
    """Where the gradient is clipped, over all parameters together. 0.1 to 1; `inf` switches clipping off."""
    weight_decay: NotNegative = 0.0
    """AdamW's pull of the weights to zero, times the learning rate. 0 to 0.01; in a LoRA it pulls to the base model."""
    optimizer: OptimizerName = "adamw"
    """AdamW with float32 moments, or 8-bit ones (`pip install 'rpo[lowbit]'`), which pay where all weights train."""
    ema_decay: Annotated[float, Range(above=0, below=1)] | None = None
    """Keep an exponential average of the parameters with this decay, which `fit` leaves in them at its end. 0.99 for
    hundreds of updates, 0.9999 for many thousands; nothing for none."""
    checkpoint_every: Count = 100
    """Updates between checkpoints; the last update always gets one. A kill costs at most this many updates."""
    trackers: tuple[Text, ...] = ()
    """Experiment trackers beside `metrics.jsonl`, each installed by you: "tensorboard", "wandb", "trackio", …"""
    progress: bool = True
    """Whether to show a progress bar."""

    def __post_init__(self) -> None:
        """Refuse a warm-up that never ends."""
        if self.warmup_updates > self.updates:
            raise InputError(
                f"warmup_updates is {self.warmup_updates} and updates {self.updates}, so that the learning rate would "
                "never reach its peak; give 0 to 10 % of updates"
            )

    def rate(self, update: int) -> float:
        """The learning rate of one update: nothing to save, nothing that resuming could shift.

        The warm-up rises in equal parts and reaches its peak in its last update, so that no update is spent at zero.
        The decays start from the peak in the first update after it and would reach zero right after the last one.
        """
        if update < self.warmup_updates:
            return self.learning_rate * (update + 1) / self.warmup_updates
        progress = (update - self.warmup_updates) / max(1, self.updates - self.warmup_updates)
        if self.lr_schedule == "cosine":
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.learning_rate * max(0.0, 1 - progress) if self.lr_schedule == "linear" else self.learning_rate


@settings
class LoopConfig(LearningSpeed):
    """The same with all that `fit` can be told; trainers work the rest out."""

    accumulate: Count = 1
    """Micro-batches per update and process. Raise it where memory limits the micro-batch: 64 pairs = 8 × 8."""
    adam_beta1: BelowOne = 0.9
    """AdamW's memory of the gradient. 0.9; 0.95 for very noisy gradients."""
    adam_beta2: BelowOne = 0.999
    """AdamW's memory of the squared gradient. 0.95 to 0.999; lower adapts sooner in short runs."""
    adam_eps: Positive = 1e-8
    """AdamW's guard against division by zero. 1e-8 to 1e-6."""
    scale_loss: bool = False
    """Scale the loss, for a model that computes in float16; updates whose gradient overflows are skipped and logged."""
    keep_checkpoints: Count = 2
    """Checkpoints that stay on the disk, at least 1. With 2 there is one to go back to if the newest is damaged."""
    log_every: Count = 1
    """Updates between lines of `metrics.jsonl`; the last update always gets one. 1 to 10."""
    seed: Seed = 0
    """Seed of the global random generators (dropout) during the run; the caller's are put back after it."""


ABSENT = "nothing said of it"
_FREE_TO_CHANGE = ("checkpoint_every", "keep_checkpoints", "log_every", "trackers", "progress")


def check_unchanged(loop: LoopConfig, saved: Mapping[str, Any], where: str, *, same_processes: bool = True) -> None:
    """Refuse to resume a run under other settings than it was started with, where they decide its result.

    How often to log and save may change, and `updates` too as long as the learning rate does not depend on it. Other
    processes share an update out in other micro-batches.
    """
    free = _FREE_TO_CHANGE + (("updates",) if loop.lr_schedule == "constant" else ())
    free += () if same_processes else ("accumulate",)
    now, before = ({name: one for name, one in these.items() if name not in free} for these in (plain(loop), saved))
    refuse_changed(now, before, where)


def refuse_changed(now: Mapping[str, Any], saved: Mapping[str, Any], where: str) -> None:
    """Refuse to resume a run that is made of something else than it was started with."""
    names = sorted(now.keys() | saved.keys())
    names = [name for name in names if now.get(name, ABSENT) != saved.get(name, ABSENT)]
    if names:
        listed = "; ".join(f"{name} from {saved.get(name, ABSENT)} to {now.get(name, ABSENT)}" for name in names)
        raise InputError(
            f"{where} cannot be resumed: what it is made of changed ({listed}); resume it with what it was started "
            "with, or train into another folder"
        )


def plain(loop: LoopConfig) -> dict[str, Any]:
    """The settings as JSON gives them back."""
    return as_written({**dataclasses.asdict(loop), "trackers": list(loop.trackers)})


def describe(loop: LoopConfig, micro_batch: int, processes: int = 1, *, unit: str = "samples") -> str:
    """What the settings come to, in one line to show before the run.

    "8 pairs × 4 micro-batches × 2 processes = 64 pairs per update; 100 updates = 6,400 pairs", for instance.
    """
    factors = [f"{micro_batch:,} {unit}", f"{loop.accumulate:,} micro-batch{'es' if loop.accumulate > 1 else ''}"]
    if processes > 1:
        factors.append(f"{processes:,} processes")
    per_update = micro_batch * loop.accumulate * processes
    product = f"{' × '.join(factors)} = {per_update:,} {unit} per update"
    return f"{product}; {loop.updates:,} updates = {per_update * loop.updates:,} {unit}"
