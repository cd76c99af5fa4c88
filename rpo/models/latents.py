"""From images to latents and back, for autoencoders that scale their latents: (z - shift) · scale."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from rpo.errors import InputError
from rpo.types import Images, Latents

IMAGES_PER_DECODE, PIXELS_PER_DECODE = 32, 8 * 512 * 512
"""What goes through the VAE decoder at once, at most: its activations are the largest of the whole pipeline."""


PIXELS_PER_SLOPE = 512 * 512
"""What goes through it at once with a gradient, which keeps the activations of all layers: an image of 512 px."""


def images_per_slope(pixels: int) -> int:
    """Images of so many pixels that are decoded at once with a gradient."""
    return max(1, min(IMAGES_PER_DECODE, PIXELS_PER_SLOPE // pixels))


def images_per_decode(pixels: int) -> int:
    """Images of so many pixels that are decoded at once."""
    return max(1, min(IMAGES_PER_DECODE, PIXELS_PER_DECODE // pixels))


def encode(vae: Any, images: Images) -> tuple[Latents, Latents]:
    """Mean and standard deviation of the scaled latents' posterior, float32; images in [0, 1], on the VAE's device."""
    posterior = vae.encode((2 * images - 1).to(vae.dtype)).latent_dist
    shift, scale = _shift_and_scale(vae, posterior.mean)
    mean = posterior.mean.float()
    return (mean if shift is None else mean - shift) * scale, posterior.std.float() * scale


def decode(vae: Any, latents: Latents) -> Images:
    """Images of scaled latents, float32, about [0, 1]: not cut off."""
    shift, scale = _shift_and_scale(vae, latents)
    unscaled = latents / scale if shift is None else latents / scale + shift
    return vae.decode(unscaled.to(vae.dtype)).sample.float() / 2 + 0.5


def _shift_and_scale(vae: Any, like: Tensor) -> tuple[Tensor | float | None, Tensor | float]:
    config = vae.config
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (
            torch.tensor(config[name], dtype=torch.float32, device=like.device).view(-1, *(1,) * (like.ndim - 2))
            for name in ("latents_mean", "latents_std")
        )
        return mean, config.get("scaling_factor", 1.0) / std
    return config.get("shift_factor"), config.get("scaling_factor", 1.0)  # some classes have none


@contextmanager
def recomputed(owner: Any) -> Iterator[None]:
    """Inside, the autoencoder of a pipeline or model keeps no activations for its gradient, but computes them again."""
    vae: Any = getattr(owner, "vae", None)
    is_on = getattr(vae, "_supports_gradient_checkpointing", False) and not vae.is_gradient_checkpointing
    if is_on:
        vae.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if is_on:
            vae.disable_gradient_checkpointing()


@contextmanager
def widened(vae: Any, *, is_on: bool) -> Iterator[None]:
    """Inside, a float16 autoencoder that overflows is a float32 one; its weights come back bit for bit."""
    narrow = vae.dtype
    is_on = is_on and narrow == torch.float16 and bool(vae.config.get("force_upcast"))
    if is_on:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if is_on:
            vae.to(narrow)


@contextmanager
def followed(model: Any, *, recomputes: bool = False) -> Iterator[None]:
    """Inside, what a model decodes can be differentiated: the way back finds the weights of the way forth.

    Args:
        model: One with an autoencoder, or without.
        recomputes: Whether activations are computed again instead of kept.
    """
    vae: Any = getattr(model, "vae", None)
    if vae is None:
        yield
        return
    with widened(vae, is_on=model.family.widens_autoencoder), recomputed(model) if recomputes else nullcontext():
        yield


def check_images(images: Images, factor: int) -> None:
    """Refuse what is not a batch of RGB images in [0, 1]; reads the range, so it costs one device synchronisation."""
    if images.ndim != 4 or images.shape[1] != 3:  # noqa: PLR2004
        raise InputError(f"images have shape {tuple(images.shape)}, but [batch, 3, height, width] is needed; give RGB")
    if images.shape[2] % factor or images.shape[3] % factor:
        raise InputError(
            f"images are {images.shape[2]}x{images.shape[3]}, but the sides must divide by {factor}; crop them"
        )
    low, high = torch.stack(images.aminmax()).tolist()
    if not (low >= 0 and high <= 1):
        raise InputError(f"images span [{low:.4g}, {high:.4g}], but [0, 1] is needed; divide by 255, or undo 2x - 1")
