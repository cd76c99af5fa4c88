"""What must hold of a checkpoint before it is asked to learn: types, latents, the noise schedule, and that it denoises.

Loading refuses what is certainly wrong. Here is what may be meant, or is seen on a picture alone.
"""

from collections.abc import Callable, Iterable

import torch

from rpo.models.checkpoint import Checkpoint
from rpo.models.plain import parts_of
from rpo.models.sound import prediction_errors
from rpo.process.diffusion import diffusion_of
from rpo.trainers.checks.own_steps import own_sigmas
from rpo.trainers.checks.preflight import Check
from rpo.types import Canvas, Images

PLAUSIBLE_ERROR = 0.5
"""Of a picture that went through the autoencoder, in its own standard deviation: sound ones are near 0.1."""

SCALES = (0.25, 4.0)
"""Between which the standard deviation of scaled latents lies; their scale is made for 1."""

FLOW_TOLERANCE, DISCRETE_TOLERANCE = 1e-4, 1e-3
"""How far two noise levels may be apart, which rounding alone moves."""


def types_agree(model: Checkpoint) -> Check:
    """Whether text encoders compute in the denoiser's type, and the autoencoder in no narrower one."""
    dtypes = {name: next(part.parameters()).dtype for name, part in parts_of(model.pipe, model.family).items()}
    dtypes[model.family.denoiser] = wanted = model.weight_dtype
    wrong = [name for name, one in dtypes.items() if one != wanted and not (name == "vae" and one == torch.float32)]
    told = ", ".join(f"{name} {_short(one)}" for name, one in dtypes.items())
    return Check(
        "types",
        not wrong,
        told,
        f"bring {', '.join(wrong)} to the type of the rest, pipe.{(wrong or [''])[0]}.to(torch.{_short(wanted)}), or "
        "load all of it with one model.dtype: with embeddings of another type people draw otherwise than it learns",
    )


def distilled(model: Checkpoint) -> Check:
    """Whether few steps are all that the checkpoint draws by; loading has refused one that nobody allowed."""
    is_meant = model.allow_distilled
    return Check("distilled", True, "told to be, and allowed" if is_meant else "nothing says so")


@torch.no_grad()
def round_trip(model: Checkpoint, images: Images) -> Check:
    """Whether a picture comes back from its latents, and these are of the size that the denoiser knows."""
    latents, _ = model.encode_moments(images.cpu())
    again, spread = model.decode(latents).cpu(), latents.std().item()
    error = ((again - images.cpu()).square().mean().sqrt() / images.std().clamp_min(1e-3)).item()
    (low, high), has_scale = SCALES, diffusion_of(model.prediction_type).is_gaussian
    told = f"off by {error:.2f} of the picture's standard deviation, {PLAUSIBLE_ERROR:g} is allowed"
    return Check(
        "VAE round trip",
        error < PLAUSIBLE_ERROR and (low < spread < high or not has_scale),
        told + (f"; latents have {spread:.2g}, {low:g} to {high:g} is allowed" if has_scale else ""),
        "if the picture is lost, the autoencoder is of another checkpoint, works in another range than [-1, 1], or "
        "overflows in its type: load the checkpoint's own, in float32; if the latents are off, correct scaling_factor "
        "(and shift_factor) in vae/config.json",
    )


def denoises(model: Checkpoint, picture: Callable[[], Images]) -> Check:
    """Whether the denoiser knows the autoencoder's latents at all; tokens of a picture that it is to draw like."""
    shown = None if diffusion_of(model.prediction_type).is_gaussian else picture()[:1].cpu()
    errors = prediction_errors(model.pipe, model.family, model.schedule, model.compute_dtype, shown=shown)
    error = errors[model.prediction_type]
    return Check(
        "denoiser denoises",
        error < 1,
        f"error {error:.2f} as {model.prediction_type}, where predicting nothing has 1",
        "it is untrained, or denoiser, autoencoder and noise schedule are not of one checkpoint: load the whole of it "
        "again",
    )


def steps_agree(model: Checkpoint, num_steps: int, canvas: Canvas) -> Check:
    """Whether rpo steps where the pipeline itself would."""
    grid = model.grid(num_steps, canvas)
    ours, own = grid.sigma[:-1].cpu().float(), own_sigmas(model.pipe, num_steps, canvas, beside=grid)
    tolerance = FLOW_TOLERANCE if model.prediction_type == "flow" else DISCRETE_TOLERANCE
    apart = (ours - own).abs().max().item() if len(ours) == len(own) else float("inf")
    return Check(
        "noise levels of the steps",
        apart <= tolerance,
        f"those of the pipeline's own {type(model.pipe.scheduler).__name__} within {apart:.1g}, at {num_steps} steps "
        f"of {canvas}",
        "the pipeline's scheduler was exchanged after it was loaded: give the pipeline to the trainer as it is now, or "
        "put the checkpoint's scheduler back",
    )


def part_looks(
    model: Checkpoint, picture: Callable[[], Images], *, num_steps: int, canvas: Canvas
) -> dict[str, Callable[[], Iterable[Check]]]:
    """All of them, by what a person calls them.

    Args:
        picture: One that the checkpoint is to draw like.
    """
    looks: dict[str, Callable[[], Iterable[Check]]] = {
        "types": lambda: [types_agree(model), distilled(model)],
        "VAE round trip": lambda: [round_trip(model, picture())],
        "denoiser denoises": lambda: [denoises(model, picture)],
    }
    if diffusion_of(model.prediction_type).is_gaussian:
        looks["noise levels of the steps"] = lambda: [steps_agree(model, num_steps, canvas)]
    return looks


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
