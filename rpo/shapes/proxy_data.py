"""The proxy reward's training set, resident on its device, and the batches drawn from it.

Half of the images are seen as rendered and half as the base's autoencoder decodes them, from latents with a little
noise: what a policy draws has such smears, and a proxy that never met one would reward or punish them at will.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTokenizer

from rpo.shapes import path
from rpo.shapes.pretrain_evaluate import to_channels_first
from rpo.shapes.pretrain_loop import write_atomically
from rpo.shapes.pretrain_vae import to_signed
from rpo.shapes.proxy_checkpoint import IMAGE_MEAN, IMAGE_STD
from rpo.shapes.proxy_scenes import FAMILY_SIZE, Families, known_prompts

LATENT_NOISE = 0.3
"""Largest standard deviation of the noise on the latents of decoded images; the latents themselves have about 1."""

DECODE_BATCH = 64


@dataclass(frozen=True)
class Data:
    """The training set on its device."""

    images: Tensor
    """uint8 [2, scenes, 3, 64, 64]: as rendered, and as the autoencoder decodes them."""
    holds: Tensor
    """[scenes, sentences]: whether a sentence holds of a scene."""
    token_ids: Tensor
    """[sentences, tokens]"""


@dataclass(frozen=True)
class Batch:
    """What one step trains on."""

    pixels: Tensor
    token_ids: Tensor
    holds: Tensor
    """[images, captions]"""


def draw_batch(data: Data, families: int, generator: torch.Generator) -> Batch:
    """Draw whole families, each image as rendered or as decoded, and one caption per image.

    The caption of an image is one that holds of it; where none does, one of its family's first scene.
    """
    device = data.holds.device
    chosen = torch.randint(data.holds.shape[0] // FAMILY_SIZE, (families, 1), generator=generator, device=device)
    rows = (chosen * FAMILY_SIZE + torch.arange(FAMILY_SIZE, device=device)).flatten()
    is_decoded = torch.randint(2, rows.shape, generator=generator, device=device)
    holds = data.holds[rows]
    first = holds[::FAMILY_SIZE].repeat_interleave(FAMILY_SIZE, 0)
    eligible = torch.where(holds.any(1, keepdim=True), holds, first)
    captions = torch.multinomial(eligible.float(), 1, generator=generator).flatten()
    return Batch(data.images[is_decoded, rows], data.token_ids[captions], holds[:, captions])


def to_pixel_values(images: Tensor) -> Tensor:
    """Images in uint8 as the model reads them."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    return (images.float() / 255 - mean) / std


def load_data(families: Families, tokenizer: CLIPTokenizer, file: Path, *, seed: int, device: torch.device) -> Data:
    """Put the training set on its device.

    Args:
        file: Where the decoded images are kept, so that they are decoded once per run.
    """
    rendered = to_channels_first(families.images)
    if not file.exists():
        vae = AutoencoderKL.from_pretrained(str(path()), subfolder="vae").to(device).requires_grad_(False)
        write_atomically({"decoded": decode_noisy(vae, rendered, seed)}, file)
    decoded = torch.load(file, weights_only=True)["decoded"]
    sentences = [prompt.text for prompt in known_prompts()]
    token_ids = tokenizer(sentences, padding="max_length", return_tensors="pt").input_ids
    images = torch.stack([rendered, decoded])
    return Data(images.to(device), truth_table(families, sentences).to(device), token_ids.to(device))


def truth_table(families: Families, sentences: Sequence[str]) -> Tensor:
    """Which of `sentences` hold of each scene, [scenes, sentences]."""
    index = {sentence: column for column, sentence in enumerate(sentences)}
    holds = torch.zeros(len(families.captions), len(sentences), dtype=torch.bool)
    for row, captions in enumerate(families.captions):
        holds[row, [index[caption] for caption in captions]] = True
    return holds


@torch.no_grad()
def decode_noisy(vae: AutoencoderKL, images: Tensor, seed: int) -> Tensor:
    """What the autoencoder makes of uint8 `images` after noise of a random strength, as uint8 on the CPU.

    Args:
        seed: Determines the noise and, up to `LATENT_NOISE`, its strength for each image.
    """
    generator = torch.Generator().manual_seed(seed)
    decoded = []
    for batch in images.split(DECODE_BATCH):
        mean = vae.encode(to_signed(batch.to(vae.device))).latent_dist.mean
        strength = LATENT_NOISE * torch.rand(len(batch), 1, 1, 1, generator=generator)
        noise = strength * torch.randn(mean.shape, generator=generator) / vae.config.scaling_factor
        pixels = vae.decode(mean + noise.to(mean)).sample
        decoded.append((pixels / 2 + 0.5).clamp(0, 1).mul(255).round().to("cpu", torch.uint8))
    return torch.cat(decoded)
