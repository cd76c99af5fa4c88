"""Where the pipeline itself would step: asked of its own call, which is ended as soon as its scheduler knows."""

from functools import wraps
from inspect import signature
from typing import Any

from diffusers import DDIMScheduler
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from rpo.models.families import family_named
from rpo.types import Canvas, Grid


class _Known(Exception):
    """The scheduler has its steps; nothing else is wanted of the call."""


def own_sigmas(pipe: Any, num_steps: int, canvas: Canvas, *, beside: Grid) -> Float[Tensor, " steps"]:
    """The noise level at each step of the pipeline's own call, for so many steps and images of that size.

    Samplers of discrete time other than DDIM have steps of their own; of them it is the level at those of `beside`.
    """
    scheduler = _asked(pipe, num_steps, canvas)
    if scheduler.config.get("use_flow_sigmas") or not hasattr(scheduler, "alphas_cumprod"):
        return scheduler.sigmas[:-1].cpu().float()
    times = scheduler.timesteps if isinstance(scheduler, DDIMScheduler) else beside.timestep[:-1]
    return (1 - scheduler.alphas_cumprod.cpu()[times.cpu().long()]).sqrt().float()


def _asked(pipe: Any, num_steps: int, canvas: Canvas) -> Any:
    """A scheduler as the pipeline's call sets it; the pipeline keeps its own."""
    kept = pipe.scheduler
    asked = type(kept).from_config(kept.config)
    ask = asked.set_timesteps

    @wraps(ask)  # pipelines look at its signature
    def set_timesteps(*given: Any, **named: Any) -> None:
        ask(*given, **named)
        raise _Known

    asked.set_timesteps = set_timesteps
    pipe.scheduler = asked
    try:
        pipe(prompt="a", num_inference_steps=num_steps, output_type="latent", **_of_size(pipe, canvas))
    except _Known:
        pass
    finally:
        pipe.scheduler = kept
    return asked


def _of_size(pipe: Any, canvas: Canvas) -> dict[str, Any]:
    """The words by which the call is about that very size, and a grey image for one that edits."""
    words = {"height": canvas.height, "width": canvas.width, "max_area": canvas.height * canvas.width}
    words |= dict.fromkeys(("use_resolution_binning", "_auto_resize"), False)  # which move to another size
    known = signature(pipe.__call__).parameters
    found: dict[str, Any] = {name: one for name, one in words.items() if name in known}
    family = family_named(type(pipe).__name__)
    if family is not None and family.edits == "always":
        found["image"] = Image.new("RGB", (canvas.width, canvas.height), "grey")
    return found
