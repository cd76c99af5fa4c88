"""The settings that every algorithm shares, each written once: where, what is trained, how fast, how it is watched."""

from dataclasses import field, fields
from typing import ClassVar, Literal

from rpo.config.ranges import Count, Names, Positive, Seed, Text, WholeNumber
from rpo.config.settings import settings
from rpo.models.config import MixedPrecision, Sharding
from rpo.training.loop_config import LearningSpeed, LoopConfig


@settings
class AdapterConfig:
    """What is trained."""

    train: Literal["lora", "full"] = "lora"
    """A LoRA adapter, or all weights of the denoiser (which keeps a frozen copy as reference)."""

    rank: Count = 16
    """Of the LoRA; 4 to 64."""

    alpha: Positive | None = None
    """Strength of the LoRA; nothing means `rank`, the one value on which every program that loads LoRAs agrees."""

    target_modules: Names | None = None
    """Name endings of the layers that get a LoRA; nothing means the attention projections."""

    reference: Literal["start", "base"] = "start"
    """What the policy is held near where it starts from a LoRA (`model.lora`, or one that the pipeline carries): that
    start, with a new adapter of `rank` beside the LoRA, or the checkpoint without it, the LoRA itself being trained."""

    gradient_checkpointing: bool = False
    """Recompute activations in backward: about a third slower, several times less memory."""


@settings
class LearningConfig(LearningSpeed):
    """How long and how fast it learns, and what goes through the denoiser at once."""

    micro_batch: Count = 8
    """What goes through the denoiser at once in training, pairs or moments; lower it when memory runs out."""

    mixed_precision: MixedPrecision = "no"
    """What the denoiser of a float32 model computes in; "no" computes in the type of the weights, and weights of the
    other half type are an error. In float16 the loss is scaled, and updates whose gradient overflows are skipped."""

    sharding: Sharding = "none"
    """Of several processes, which hold a copy of the denoiser each ("none"), a part of one ("full"), or a part of one
    on each machine ("hybrid"). For a base that does not fit one GPU; every forward waits for its parts."""

    def loop(self, *, accumulate: int, seed: int, scale_loss: bool = False) -> LoopConfig:
        """The settings of the loop."""
        shared = {one.name: getattr(self, one.name) for one in fields(LearningSpeed)}
        return LoopConfig(**shared, accumulate=accumulate, seed=seed, scale_loss=scale_loss)


@settings
class TrainingConfig:
    """What the settings of every algorithm begin with."""

    renamed: ClassVar[dict[str, str]] = {"loop": "it is learning now", "folder": "it is output now"}

    output: Text = "runs/train"
    """The run's folder: metrics, previews, checkpoints and, after `save`, the LoRA."""

    seed: Seed = 0
    """Of everything random: the adapter's start, the order of data, times, noise."""

    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """What is trained."""

    learning: LearningConfig = field(default_factory=LearningConfig)
    """How it learns."""

    preview_every: WholeNumber = 20
    """Updates between image grids of fixed prompts and seeds in `previews/`; 0 for none."""

    preflight: bool = True
    """Whether what must hold for the run to learn is checked before the first update, and memory added up."""
