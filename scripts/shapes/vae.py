"""The autoencoder: L1 + L2 + a little KL (Kingma and Welling, arXiv:1312.6114), and what it makes of images.

Latent diffusion (arXiv:2112.10752) adds a perceptual and an adversarial loss for texture; flat shapes have none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from rpo.training.loop import LoopConfig
from scripts.shapes.networks import build_vae, seeded
from scripts.shapes.training import train

BATCH, ENCODE_BATCH = 32, 64
KL_WEIGHT = 1e-4
"""Per latent dimension: keeps the latents near unit scale and costs well under 1 dB."""


@dataclass(frozen=True)
class Moments:
    """Scaled posterior mean and standard deviation of every image's latents."""

    mean: Tensor
    std: Tensor

    def draw(self, picked: Tensor, generator: torch.Generator) -> Tensor:
        """Latents of some of the images."""
        mean = self.mean[picked]
        return mean + self.std[picked] * torch.randn(mean.shape, generator=generator, device=mean.device)


def train_vae(
    images: Tensor,
    folder: Path,
    loop: LoopConfig,
    *,
    data: str,
    seed: int,
    build: Callable[[], AutoencoderKL] = build_vae,
    batch: int = BATCH,
    l1_weight: float = 1.0,
) -> AutoencoderKL:
    """Train an autoencoder on uint8 [count, 3, height, width] where these are, and set its `scaling_factor`."""
    vae = seeded(seed, build).to(images.device)
    cell = 2 ** (len(vae.config.block_out_channels) - 1)
    latent = (vae.config.latent_channels, images.shape[2] // cell, images.shape[3] // cell)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        picked = torch.randint(len(images), (batch,), generator=generator, device=images.device)
        return images[picked], torch.randn(batch, *latent, generator=generator, device=images.device)

    train(folder, vae, draw, lambda drawn: vae_loss(vae, *drawn, l1_weight=l1_weight), loop, data=data, seed=seed)
    moments = encode(vae, images[:4096], scale=1.0)  # so that the diffusion starts from unit scale
    vae.register_to_config(scaling_factor=1 / (moments.mean.var() + (moments.std**2).mean()).sqrt().item())
    return vae


def vae_loss(vae: AutoencoderKL, images: Tensor, noise: Tensor, *, l1_weight: float = 1.0) -> Tensor:
    """`l1_weight` L1 + L2 of the reconstruction from one posterior sample, + `KL_WEIGHT` KL per latent dimension."""
    wanted = to_signed(images)
    posterior = vae.encode(wanted).latent_dist
    found = vae.decode(posterior.mean + posterior.std * noise).sample
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    return l1_weight * functional.l1_loss(found, wanted) + functional.mse_loss(found, wanted) + KL_WEIGHT * kl


def channels_first(images: NDArray[np.uint8]) -> Tensor:
    """Images as numpy and PIL have them, [count, height, width, 3], in torch's order."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def to_signed(images: Tensor) -> Tensor:
    """Images in uint8 to the [-1, 1] that an AutoencoderKL reads."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, *, scale: float | None = None) -> Moments:
    """The latents of uint8 images, scaled as the diffusion sees them."""
    factor = vae.config.scaling_factor if scale is None else scale
    parts = [vae.encode(to_signed(batch.to(vae.device))).latent_dist for batch in images.split(ENCODE_BATCH)]
    return Moments(*(factor * torch.cat([getattr(one, name) for one in parts]) for name in ("mean", "std")))


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """The images of scaled latents: RGB in [0, 1]."""
    parts = [vae.decode(batch / vae.config.scaling_factor).sample for batch in latents.split(ENCODE_BATCH)]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


def psnr(images: Tensor, reconstruction: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all pixels together, which is never above the mean over images."""
    return -10 * functional.mse_loss(reconstruction, images.float() / 255).log10().item()
