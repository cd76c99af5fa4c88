"""What a pipeline does when nobody says how: the defaults in the signature of its own call."""

from inspect import signature
from typing import Any

from rpo.errors import InputError
from rpo.models.base import DiffusionModel
from rpo.models.checkpoint import Checkpoint


def usual_steps(model: DiffusionModel, given: int | None = None) -> int:
    """The number of steps that is given, or the pipeline's own (50 for Stable Diffusion)."""
    return _default(model, "num_inference_steps") if given is None else given


def usual_guidance(model: DiffusionModel, given: float | None = None) -> float:
    """The guidance scale that is given, or the pipeline's own (7.5 for Stable Diffusion)."""
    if given is not None or not isinstance(model, Checkpoint):
        return _default(model, "guidance_scale") if given is None else given
    return _default(model, model.family.guidance_argument) + model.family.guidance_offset


def _default(model: DiffusionModel, name: str) -> Any:
    if not isinstance(model, Checkpoint):
        raise InputError(f"a {type(model).__name__} has no usual {name}; expected a number; set it")
    return signature(type(model.pipe).__call__).parameters[name].default
