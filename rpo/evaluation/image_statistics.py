"""What images look like, whatever was asked for: numbers that move when a policy games its reward.

Policies that learn from a model of taste drift the same few ways: colours burn in, detail turns to grain or melts away,
all images of a prompt become one. Each number here is cheap, needs no model, and says one of these things.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rpo.types import Images, PerSample

LUMA = (0.299, 0.587, 0.114)
"""What red, green and blue count in brightness (ITU-R BT.601)."""

LEVELS = 8
"""Of each colour, for the entropy: 512 colours in all, at most 9 bits."""

EDGE = 0.1
"""How much brightness changes from a pixel to the next but one where there is an edge."""

NEIGHBOURS = 3
"""Pixels that a difference spans: of smaller images there is none, and it is 0."""


def saturation(images: Images) -> PerSample:
    """How colourful: the mean distance of a pixel's highest colour from its lowest; 0 is grey, 1 pure colour."""
    return (images.amax(dim=1) - images.amin(dim=1)).mean(dim=(1, 2))


def colour_entropy(images: Images) -> PerSample:
    """Entropy of the image's colours in bits: 0 is one colour alone, 9 all of them alike often."""
    levels = (images * LEVELS).long().clamp(0, LEVELS - 1)
    colours = (levels[:, 0] * LEVELS + levels[:, 1]) * LEVELS + levels[:, 2]
    flat = colours.flatten(1)
    counts = images.new_zeros(len(images), LEVELS**3).scatter_add_(1, flat, torch.ones_like(flat, dtype=images.dtype))
    return torch.special.entr(counts / flat.shape[1]).sum(dim=1) / torch.log(images.new_tensor(2.0))


def edge_density(images: Images) -> PerSample:
    """Share of the inner pixels at which brightness changes by more than `EDGE`."""
    if min(images.shape[2:]) < NEIGHBOURS:
        return images.new_zeros(len(images))
    light = _light(images)
    across, down = light[:, 1:-1, 2:] - light[:, 1:-1, :-2], light[:, 2:, 1:-1] - light[:, :-2, 1:-1]
    return (torch.hypot(across, down) > EDGE).to(images.dtype).mean(dim=(1, 2))


def sharpness(images: Images) -> PerSample:
    """Root mean square of the Laplacian of brightness: 0 is flat, and blur lowers it."""
    if min(images.shape[2:]) < NEIGHBOURS:
        return images.new_zeros(len(images))
    kernel = images.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    laplacian = functional.conv2d(_light(images)[:, None], kernel)
    return laplacian.square().mean(dim=(1, 2, 3)).sqrt()


def high_frequency(images: Images) -> PerSample:
    """Share of the contrast that is finer than four pixels, from 0 to 1: grain and grids raise it."""
    light = _light(images)
    spectrum = torch.fft.fft2(light - light.mean(dim=(1, 2), keepdim=True)).abs().square()
    height, width = light.shape[1:]
    rows, columns = (torch.fft.fftfreq(side, device=images.device).abs() for side in (height, width))
    is_fine = torch.maximum(rows[:, None], columns[None, :]) > 1 / 4
    total = spectrum.sum(dim=(1, 2))
    tiny = torch.finfo(total.dtype).eps * height * width  # of a flat image no share is fine
    return (spectrum * is_fine).sum(dim=(1, 2)) / total.clamp(min=tiny)


STATISTICS: dict[str, Callable[[Images], PerSample]] = {
    "saturation": saturation,
    "colour_entropy": colour_entropy,
    "edge_density": edge_density,
    "sharpness": sharpness,
    "high_frequency": high_frequency,
}
"""By name; each from RGB images in [0, 1] to one number of each."""


@torch.no_grad()
def image_statistics(images: Images) -> dict[str, PerSample]:
    """All of them.

    Args:
        images: RGB in [0, 1].

    Example:
        >>> {name: one.item() for name, one in image_statistics(torch.ones(1, 3, 8, 8)).items()}["saturation"]
        0.0
    """
    images = images.float()
    return {name: measure(images) for name, measure in STATISTICS.items()}


def pixel_diversity(images: Images, per_group: int) -> Tensor:
    """How far images of one prompt lie apart: root mean squared difference of two of them, one number per group.

    Args:
        images: Those of a group beside each other, `per_group` of each; 2 or more.
    """
    grouped = images.float().unflatten(0, (-1, per_group)).flatten(2)
    return (2 * grouped.var(dim=1, correction=1).mean(dim=1)).sqrt()


def embedding_diversity(embeddings: Tensor, per_group: int) -> Tensor:
    """The same by what a model sees: 1 less the mean cosine of two images of a group.

    Args:
        embeddings: Unit vectors [images, dim], those of a group beside each other.
    """
    grouped = embeddings.unflatten(0, (-1, per_group))
    squared = grouped.sum(dim=1).square().sum(dim=-1)
    return 1 - (squared - per_group) / (per_group * (per_group - 1))


def embedder(*rewards: Any) -> Callable[[Images], Tensor] | None:
    """What the first of these that has eyes sees: from images to unit vectors."""
    return next((one.embed_images for one in rewards if hasattr(one, "embed_images")), None)


def _light(images: Images) -> Tensor:
    return torch.einsum("bchw,c->bhw", images, images.new_tensor(LUMA))
