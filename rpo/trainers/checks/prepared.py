"""The model that a trainer is given: checked once more, with LoRAs or none, and in the precision of the settings."""

from typing import Any

import torch

from rpo.adapters.lora import hand_over, refuse_adapter, start_adapters
from rpo.errors import InputError
from rpo.models.base import DiffusionModel
from rpo.models.checkpoint import Checkpoint
from rpo.models.config import HALF_TYPES
from rpo.trainers.settings import LearningConfig
from rpo.training.optimizer import check_optimizer


def prepared_model(given: Any, learning: LearningConfig) -> DiffusionModel:
    """A pipeline as a model that can be trained; a model of another kind decides about its precision itself."""
    check_optimizer(learning.optimizer)
    model = given if isinstance(given, DiffusionModel) else Checkpoint(given)  # which refuses what is no pipeline
    if not isinstance(model, Checkpoint):
        if learning.mixed_precision != "no":
            raise InputError(
                f"learning.mixed_precision is {learning.mixed_precision}, but a {type(given).__name__} decides itself "
                "in what it computes; leave it out"
            )
        return model
    if model is given:
        model.check()  # for the pipeline may have been altered since
    for name, part in model.pipe.components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        if part is model.denoiser or name in model.text_encoders:
            start_adapters(part, name)  # training may go on from them
        else:
            refuse_adapter(part, name)
    hand_over(model.denoiser)
    wanted = getattr(torch, HALF_TYPES.get(learning.mixed_precision, ""), model.compute_dtype)
    if wanted == model.compute_dtype:
        return model
    if model.compute_dtype != torch.float32:
        raise InputError(
            f"learning.mixed_precision is {learning.mixed_precision}, but the denoiser computes in "
            f"{model.compute_dtype}; leave learning.mixed_precision out, or load the model in float32"
        )
    return Checkpoint(model.pipe, compute_dtype=wanted, allow_distilled=model.allow_distilled)


def computes_in(model: DiffusionModel, *types: torch.dtype) -> bool:
    """Whether the denoiser computes in one of these types: in float16, losses are scaled against underflow."""
    return isinstance(model, Checkpoint) and model.compute_dtype in types
