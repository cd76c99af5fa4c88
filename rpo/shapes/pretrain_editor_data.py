"""What the shapes editor learns from: triples drawn, rendered and encoded once, and the batches of a step.

Every other source passes through a disturbed latent and back before it is encoded, so that it has the faint flaws of a
decoded image: what the editor will be given is drawn by a model and not rendered.
"""

from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTokenizer

from rpo.shapes.edit_world import triples
from rpo.shapes.pretrain_evaluate import to_channels_first
from rpo.shapes.pretrain_loop import seed_of
from rpo.shapes.pretrain_vae import ENCODE_BATCH, Moments, encode_moments
from rpo.shapes.world import Scene, render

NO_IMAGE_RATE = NO_TEXT_RATE = NEITHER_RATE = 0.05
"""Shares of the batch without source, without instruction and without both, for guidance by each of them; those of
InstructPix2Pix (arXiv:2211.09800, section 3.2.1)."""

DISTURBANCE = 0.1
"""Standard deviation of the noise on the (unit scale) latents of every other source."""


@dataclass(frozen=True)
class Instructed:
    """The training set on its device."""

    source: Tensor
    """Latents of the sources as the pipeline takes them: the mode of the posterior, not scaled."""
    edited: Moments
    """Scaled moments of the edited scenes."""
    token_ids: Tensor
    empty_ids: Tensor


@dataclass(frozen=True)
class InstructedBatch:
    """What one step trains on; `inputs` are the noisy latents with those of the source behind them."""

    inputs: Tensor
    timestep: Tensor
    token_ids: Tensor
    eps: Tensor


def draw_instructed(vae: AutoencoderKL, tokenizer: CLIPTokenizer, count: int, seed: int) -> Instructed:
    """Draw and encode a training set.

    Args:
        vae: The autoencoder; its device does the work and holds the result.

    Returns:
        The set; no instruction of it has a held-out sentence.
    """
    drawn = list(islice(triples(seed), count))
    generator = torch.Generator(vae.device).manual_seed(seed_of(seed, count))
    source = encode_moments(vae, rendered([triple.source for triple in drawn], vae)).mean
    source[::2] = disturbed(vae, source[::2], generator)
    edited = encode_moments(vae, rendered([triple.edited for triple in drawn], vae))
    ids = [_token_ids(tokenizer, texts).to(vae.device) for texts in ([one.instruction for one in drawn], [""])]
    return Instructed(source / vae.config.scaling_factor, edited, *ids)


def rendered(scenes: list[Scene], vae: AutoencoderKL) -> Tensor:
    """The scenes as uint8 [count, 3, 64, 64] on the device of `vae`."""
    return to_channels_first(np.stack([render(scene) for scene in scenes])).to(vae.device)


@torch.no_grad()
def disturbed(vae: AutoencoderKL, latents: Tensor, generator: torch.Generator) -> Tensor:
    """Scaled latents of the images that slightly wrong latents decode to."""
    scale, results = vae.config.scaling_factor, []
    for batch in latents.split(ENCODE_BATCH):
        noise = torch.randn(batch.shape, generator=generator, device=batch.device)
        images = vae.decode((batch + DISTURBANCE * noise) / scale).sample.clamp(-1, 1)
        results.append(vae.encode(images).latent_dist.mean * scale)
    return torch.cat(results)


def _token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def draw_batch(
    data: Instructed, alphas_cumprod: Tensor, batch_size: int, generator: torch.Generator
) -> InstructedBatch:
    """Draw triples, timesteps, noise and which of them go without a source, an instruction or both."""
    mean, std, device = data.edited.mean, data.edited.std, data.source.device
    picked = torch.randint(mean.shape[0], (batch_size,), generator=generator, device=device)
    timestep = torch.randint(alphas_cumprod.shape[0], (batch_size,), generator=generator, device=device)
    chance = torch.rand(batch_size, generator=generator, device=device)
    posterior_noise, eps = torch.randn(2, batch_size, *mean.shape[1:], generator=generator, device=device)
    x_0 = mean[picked] + std[picked] * posterior_noise
    alpha_squared = alphas_cumprod[timestep].view(-1, 1, 1, 1)
    x_t = alpha_squared.sqrt() * x_0 + (1 - alpha_squared).sqrt() * eps
    has_no_text = chance < NO_TEXT_RATE + NEITHER_RATE
    has_no_image = (chance >= NO_TEXT_RATE) & (chance < NO_TEXT_RATE + NEITHER_RATE + NO_IMAGE_RATE)
    source = data.source[picked] * ~has_no_image.view(-1, 1, 1, 1)
    token_ids = torch.where(has_no_text.view(-1, 1), data.empty_ids, data.token_ids[picked])
    return InstructedBatch(torch.cat([x_t, source], dim=1), timestep, token_ids, eps)
