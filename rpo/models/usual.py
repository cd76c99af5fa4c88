"""The words of a pipeline's own call: what it does when nobody says how, and how to say it."""

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


def call_of(
    model: Checkpoint, *, num_steps: int | None, guidance_scale: float | None, eta: float | None
) -> dict[str, float | str]:
    """The arguments by which the pipeline itself draws so; what is nothing, or unknown to it, is left out."""
    family, known = model.family, signature(type(model.pipe).__call__).parameters
    words: dict[str, float | str | None] = {"num_inference_steps": num_steps, "eta": eta}
    if guidance_scale is not None:
        words[family.guidance_argument] = guidance_scale - family.guidance_offset
        if family.guidance_argument == "true_cfg_scale":  # which does nothing without a prompt to push away from
            words["negative_prompt"] = ""
    return {name: one for name, one in words.items() if one is not None and name in known}


def _default(model: DiffusionModel, name: str) -> Any:
    if not isinstance(model, Checkpoint):
        raise InputError(f"a {type(model).__name__} has no usual {name}; expected a number; set it")
    return signature(type(model.pipe).__call__).parameters[name].default
