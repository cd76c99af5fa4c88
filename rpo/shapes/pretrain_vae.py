"""The autoencoder of the embedded checkpoint: L1 + L2 + a little KL (Kingma and Welling, arXiv:1312.6114).

Latent diffusion (arXiv:2112.10752) adds a perceptual and an adversarial loss for texture; flat shapes have none.
"""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from rpo.shapes.networks import build_vae
from rpo.shapes.pretrain_loop import Phase, TrainingLog, one_cycle, round_to_half, set_learning_rate, train

KL_WEIGHT = 1e-4
"""Per latent dimension: keeps the latents near unit scale and costs well under 1 dB."""

ENCODE_BATCH = 64


@dataclass(frozen=True)
class Moments:
    """Scaled posterior mean and standard deviation of every image's latents."""

    mean: Tensor
    std: Tensor


def train_vae(
    images: Tensor, phase: Phase, *, batch_size: int, learning_rate: float, log: TrainingLog
) -> AutoencoderKL:
    """Train the autoencoder and set its `scaling_factor`.

    Args:
        images: Scenes, uint8 `[count, 3, 64, 64]`, on the training device.

    Returns:
        The autoencoder, frozen, with weights as half precision will hold them.
    """
    device = images.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(phase.seed)
        vae = build_vae()
    vae = vae.to(device)
    optimizer = torch.optim.Adam(vae.parameters(), lr=learning_rate, fused=True)

    def step(index: int, generator: torch.Generator) -> Tensor:
        picked = torch.randint(images.shape[0], (batch_size,), generator=generator, device=device)
        loss = vae_loss(vae, to_signed(images[picked]), generator)
        set_learning_rate(optimizer, one_cycle(index, steps=phase.steps, peak=learning_rate))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        return loss

    train(phase, step, {"vae": vae, "optimizer": optimizer}, device=device, log=log)
    vae.eval().requires_grad_(False)
    round_to_half([vae])
    vae.register_to_config(scaling_factor=_scaling_factor(vae, images[:4096]))
    return vae


def vae_loss(vae: AutoencoderKL, images: Tensor, generator: torch.Generator) -> Tensor:
    """L1 + L2 of the reconstruction from one posterior sample, + `KL_WEIGHT` times the KL per latent dimension."""
    posterior = vae.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator, device=images.device)
    reconstruction = vae.decode(posterior.mean + posterior.std * noise).sample
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    return functional.l1_loss(reconstruction, images) + functional.mse_loss(reconstruction, images) + KL_WEIGHT * kl


def to_signed(images: Tensor) -> Tensor:
    """Images in uint8 to the [-1, 1] that an AutoencoderKL reads."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def _scaling_factor(vae: AutoencoderKL, images: Tensor) -> float:
    """One over the standard deviation of sampled latents, so that the diffusion starts from unit scale."""
    moments = _unscaled_moments(vae, images)
    return 1 / (moments.mean.var() + (moments.std**2).mean()).sqrt().item()


@torch.no_grad()
def encode_moments(vae: AutoencoderKL, images: Tensor) -> Moments:
    """Scaled posterior moments of uint8 `images`, float32, on their device."""
    moments = _unscaled_moments(vae, images)
    scale = vae.config.scaling_factor
    return Moments(moments.mean * scale, moments.std * scale)


def _unscaled_moments(vae: AutoencoderKL, images: Tensor) -> Moments:
    posteriors = [vae.encode(to_signed(batch)).latent_dist for batch in images.split(ENCODE_BATCH)]
    return Moments(torch.cat([one.mean for one in posteriors]), torch.cat([one.std for one in posteriors]))


@torch.no_grad()
def round_trip(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """What the autoencoder makes of uint8 `images`: RGB in [0, 1]."""
    decoded = [vae.decode(vae.encode(to_signed(batch)).latent_dist.mean).sample for batch in images.split(ENCODE_BATCH)]
    return (torch.cat(decoded) / 2 + 0.5).clamp(0, 1)


def psnr(images: Tensor, reconstruction: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all pixels together, which is never above the mean over images."""
    error = functional.mse_loss(reconstruction, images.float() / 255)
    return -10 * error.log10().item()
