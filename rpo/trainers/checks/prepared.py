"""The model that a trainer is given: checked once more, without an adapter, and in the precision of the settings."""

from dataclasses import replace

import torch
from diffusers import DiffusionPipeline

from rpo.adapters.lora import refuse_adapter
from rpo.errors import InputError
from rpo.models.base import DiffusionModel
from rpo.models.checkpoint import Checkpoint
from rpo.training.loop_config import LoopConfig

HALF_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def prepared_pipeline(pipe: DiffusionPipeline | Checkpoint, loop: LoopConfig) -> Checkpoint:
    """A pipeline as a model that can be trained.

    Args:
        pipe: As the caller gave it; a view of it is checked again, for the pipeline may have been altered since.
    """
    if isinstance(pipe, Checkpoint):
        pipe.check()
    given = pipe if isinstance(pipe, Checkpoint) else Checkpoint(pipe)
    for name, part in given.pipe.components.items():
        if isinstance(part, torch.nn.Module):
            refuse_adapter(part, name)
    wanted = HALF_TYPES.get(loop.mixed_precision)
    if wanted in (None, given.compute_dtype):
        return given
    if given.compute_dtype != torch.float32:
        raise InputError(
            f"loop.mixed_precision is {loop.mixed_precision}, but the denoiser computes in {given.compute_dtype}; "
            "leave loop.mixed_precision out, or load the model in float32"
        )
    return Checkpoint(given.pipe, compute_dtype=wanted)


def prepared_model(model: DiffusionPipeline | DiffusionModel, loop: LoopConfig) -> DiffusionModel:
    """As `prepared_pipeline`; a model of another kind decides about its precision itself."""
    if isinstance(model, DiffusionPipeline | Checkpoint):
        return prepared_pipeline(model, loop)
    if loop.mixed_precision != "no":
        raise InputError(
            f"loop.mixed_precision is {loop.mixed_precision}, but a {type(model).__name__} decides itself in what it "
            "computes; leave it out"
        )
    return model


def loop_for(model: DiffusionModel, loop: LoopConfig, *, accumulate: int) -> LoopConfig:
    """The loop's settings as they count: the loss is scaled if and only if the model computes in float16."""
    is_float16 = isinstance(model, Checkpoint) and model.compute_dtype == torch.float16
    return replace(loop, accumulate=accumulate, mixed_precision="fp16" if is_float16 else loop.mixed_precision)
