"""The VQ model of the token generator: the checkpoint's autoencoder with a codebook (arXiv:1711.00937).

Its networks are those of the embedded AutoencoderKL. A token is the code nearest to a latent, and the codes are centres
by k-means of latents. That keeps what the verifier reads, so that no network has to be trained for it. Three cells of
four show nothing but background, whose tint no prompt asks for, so that only one in ten of these is among the points.
"""

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor

from scripts.shapes.networks import build_vq
from scripts.shapes.vae import ENCODE_BATCH

KMEANS_IMAGES, KMEANS_ROUNDS = 2048, 12
FLAT_RANGE = 6
"""Range of a cell's pixels up to which it shows one colour and nothing else."""

FLAT_SHARE = 0.1
"""Share of the flat cells that count among the points of k-means."""


def make_vq(vae: AutoencoderKL, images: Tensor, generator: torch.Generator) -> VQModel:
    """A VQ model of an autoencoder for uint8 [count, 3, height, width], its weights rounded to half precision.

    As AmusedPipeline wants it, it reads and writes [0, 1], where the autoencoder has [-1, 1].
    """
    vq = build_vq().to(images.device)
    weights = {name: value.clone() for name, value in vae.state_dict().items()}
    size = vq.config.latent_channels
    mixing = weights["quant_conv.weight"][:size, :, 0, 0]  # of the means; the other half gives variances
    for part in ("weight", "bias"):
        weights[f"encoder.conv_out.{part}"] = torch.tensordot(mixing, weights[f"encoder.conv_out.{part}"], 1)
    weights["encoder.conv_out.bias"] += weights["quant_conv.bias"][:size]
    weights["quant_conv.weight"] = torch.eye(size, device=images.device).view(size, size, 1, 1)
    weights["quant_conv.bias"] = torch.zeros(size, device=images.device)
    weights["encoder.conv_in.bias"] -= weights["encoder.conv_in.weight"].sum((1, 2, 3))
    weights["encoder.conv_in.weight"] *= 2
    weights["decoder.conv_out.bias"] = (weights["decoder.conv_out.bias"] + 1) / 2
    weights["decoder.conv_out.weight"] /= 2
    weights["quantize.embedding.weight"] = vq.quantize.embedding.weight
    vq.load_state_dict({name: value.half() for name, value in weights.items()})
    vq.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # twice as fast on a CPU
    centers = _codebook(vq, images[:KMEANS_IMAGES], generator)
    vq.quantize.embedding.weight.copy_(centers.half())
    return vq


def _codebook(vq: VQModel, images: Tensor, generator: torch.Generator) -> Tensor:
    """The latents of images in as many centres as there are codes."""
    latents = torch.cat([_latents(vq, batch) for batch in images.split(ENCODE_BATCH)])
    cells = images.unflatten(2, (latents.shape[1], -1)).unflatten(4, (latents.shape[2], -1))
    is_flat = (cells.amax((3, 5)).int() - cells.amin((3, 5)).int()).amax(1) <= FLAT_RANGE
    chance = torch.rand(is_flat.shape, generator=generator, device=images.device)
    return kmeans(latents[~is_flat | (chance < FLAT_SHARE)], vq.config.num_vq_embeddings, generator)


def kmeans(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` centres of points [points, dims]; a centre that is nearest to none moves to a random point."""
    centers = points[torch.randperm(len(points), generator=generator, device=points.device)[:count]]
    for _ in range(KMEANS_ROUNDS):
        nearest = _nearest(points, centers)
        sizes = torch.bincount(nearest, minlength=count)[:, None]
        sums = torch.zeros_like(centers).index_add_(0, nearest, points)
        others = points[torch.randint(len(points), (count,), generator=generator, device=points.device)]
        centers = torch.where(sizes > 0, sums / sizes.clamp(min=1), others)
    return centers


def _nearest(points: Tensor, centers: Tensor) -> Tensor:
    return torch.cat([torch.cdist(some, centers).argmin(1) for some in points.split(16_384)])


@torch.no_grad()
def encode_tokens(vq: VQModel, images: Tensor) -> Tensor:
    """The codes of uint8 images, int64 [count, rows, columns]."""
    codes = vq.quantize.embedding.weight
    parts: list[Tensor] = []
    for batch in images.split(ENCODE_BATCH):
        latents = _latents(vq, batch)
        parts.append(_nearest(latents.flatten(0, -2), codes).view(latents.shape[:-1]))
    return torch.cat(parts)


@torch.no_grad()
def _latents(vq: VQModel, images: Tensor) -> Tensor:
    """Of uint8 images, [count, rows, columns, dims]."""
    pixels = images.to(vq.device, memory_format=torch.channels_last).float() / 255
    return vq.encode(pixels).latents.movedim(1, -1).contiguous()


@torch.no_grad()
def decode_tokens(vq: VQModel, tokens: Tensor) -> Tensor:
    """The images of codes, RGB in [0, 1], as AmusedPipeline decodes them."""
    parts: list[Tensor] = []
    for batch in tokens.split(ENCODE_BATCH):
        shape = (*batch.shape, vq.config.latent_channels)
        parts.append(vq.decode(batch, force_not_quantize=True, shape=shape).sample)
    return torch.cat(parts).clamp(0, 1)
