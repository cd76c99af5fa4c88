"""Train the embedded checkpoint from nothing: `python -m scripts.shapes.pretrain output=FOLDER`.

Scenes are drawn and the autoencoder learns them; every scene is encoded once, then UNet and text encoder learn together
on latents. One caption in ten is emptied, for classifier-free guidance (arXiv:2207.12598). Their learning rate stays
constant, and a moving average of the weights does what a decay would do.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from rpo.config.ranges import Count, Seed, Text, WholeNumber
from rpo.config.settings import settings
from rpo.devices import device_named
from rpo.shapes.world import training_scenes
from rpo.training.loop import LoopConfig
from scripts.shapes.evaluate import evaluate_checkpoint
from scripts.shapes.networks import (
    assemble,
    build_text_to_latent,
    build_tokenizer,
    save_pipeline,
    seeded,
    token_ids,
    world_words,
    write_evaluation,
)
from scripts.shapes.training import Noisy, denoising_loss, from_command_line, noisy, seed_of, train
from scripts.shapes.vae import Moments, channels_first, encode, train_vae

BATCH = 48
EMPTY_CAPTION_RATE = 0.1


@settings
class PretrainConfig:
    """Everything that a run depends on."""

    output: Path = Path("runs/shapes-pretrain")
    """The two trainings, which go on after a kill, and the finished diffusers folder `checkpoint`."""
    device: Text = "auto"
    """Device of training and evaluation; "auto" takes the GPU when there is one."""
    seed: Seed = 0
    """Determines scenes, initial weights and noise."""
    scenes: Count = 24_576
    """Scenes drawn once and used over and over; 10,000 to 100,000."""
    evaluate: WholeNumber = 400
    """Images drawn per split to measure the result; 0 skips it."""
    vae: LoopConfig = field(default_factory=lambda: LoopConfig(1000, 2e-3, "cosine", 300, log_every=50))
    """How the autoencoder is trained; 800 updates give 33 dB, more give more."""
    denoiser: LoopConfig = field(
        default_factory=lambda: LoopConfig(
            3000, 1e-3, "constant", 100, adam_beta2=0.99, weight_decay=0.01, ema_decay=0.9995, log_every=50
        )
    )
    """How UNet and text encoder are trained; the updates may be raised for a run that is to go on."""


@dataclass(frozen=True)
class Captioned:
    """The training set on its device."""

    moments: Moments
    token_ids: Tensor
    empty_ids: Tensor

    def draw(self, generator: torch.Generator) -> Noisy:
        """Draw latents, captions, times and noise."""
        device = self.token_ids.device
        picked = torch.randint(len(self.token_ids), (BATCH,), generator=generator, device=device)
        is_empty = torch.rand(BATCH, 1, generator=generator, device=device) < EMPTY_CAPTION_RATE
        captions = torch.where(is_empty, self.empty_ids, self.token_ids[picked])
        return noisy(self.moments.draw(picked, generator), captions, generator)


def pretrain(config: PretrainConfig) -> None:
    """Train, save and measure the checkpoint."""
    device, seed, data = device_named(config.device), config.seed, f"{config.scenes} scenes"
    tokenizer = build_tokenizer(config.output / "tokenizer", world_words())
    scenes, captions = training_scenes(seed_of(seed, 0), config.scenes)
    images = channels_first(scenes).to(device)
    vae = train_vae(images, config.output / "vae", config.vae, data=data, seed=seed)
    networks = seeded(seed, build_text_to_latent).to(device)
    captioned = Captioned(encode(vae, images), *(token_ids(tokenizer, texts, device) for texts in (captions, [""])))
    loss_of = partial(denoising_loss, networks)
    train(config.output / "denoiser", networks, captioned.draw, loss_of, config.denoiser, data=data, seed=seed)
    folder = config.output / "checkpoint"
    save_pipeline(assemble(StableDiffusionPipeline, vae, networks, tokenizer), folder, world_words())
    if config.evaluate:
        write_evaluation(folder, evaluate_checkpoint(folder, config.evaluate, seed=seed, device=device))


if __name__ == "__main__":
    pretrain(from_command_line(PretrainConfig, __doc__))
