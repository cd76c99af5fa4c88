"""Train the words checkpoint from nothing: `python -m scripts.words.pretrain output=FOLDER`.

As the shapes checkpoint is made (`scripts.shapes.pretrain`): the autoencoder learns the images, every image is encoded
once, then UNet and text encoder learn together, and one caption in ten is emptied. What differs is that the captions
lie: each letter of an image is with a probability of `mistakes` another one than its caption says. So the base knows
how to write every word, and often writes another one: as models do that learnt from the web, and as reinforcement can
mend.
"""

from dataclasses import field
from functools import partial
from pathlib import Path

from diffusers import StableDiffusionPipeline

from rpo.config.ranges import BelowOne, Count, Seed, Text, WholeNumber
from rpo.config.settings import settings
from rpo.devices import device_named
from rpo.training.loop import LoopConfig
from rpo.words.world import training_images
from scripts.shapes.networks import assemble, build_tokenizer, save_pipeline, seeded, token_ids, write_evaluation
from scripts.shapes.pretrain import Captioned
from scripts.shapes.training import denoising_loss, from_command_line, seed_of, train
from scripts.shapes.vae import channels_first, encode, train_vae
from scripts.words.evaluate import evaluate_checkpoint
from scripts.words.networks import KNOWN, MAX_TOKENS, build_text_to_latent, build_vae

VAE_BATCH = 16


@settings
class WordsConfig:
    """Everything that a run depends on."""

    output: Path = Path("runs/words-pretrain")
    """The two trainings, which go on after a kill, and the finished diffusers folder `checkpoint`."""
    device: Text = "auto"
    """Device of training and evaluation; "auto" takes the GPU when there is one."""
    seed: Seed = 0
    """Determines images, initial weights and noise."""
    images: Count = 24_576
    """Images drawn once and used over and over; 10,000 to 100,000."""
    mistakes: BelowOne = 0.25
    """Probability of each letter of an image to be another one than its caption says."""
    evaluate: WholeNumber = 300
    """Images drawn per split to measure the result; 0 skips it."""
    vae: LoopConfig = field(default_factory=lambda: LoopConfig(800, 2e-3, "cosine", 30, log_every=50))
    """How the autoencoder is trained."""
    denoiser: LoopConfig = field(
        default_factory=lambda: LoopConfig(
            2000, 1e-3, "constant", 100, adam_beta2=0.99, weight_decay=0.01, ema_decay=0.9995, log_every=50
        )
    )
    """How UNet and text encoder are trained; the updates may be raised for a run that is to go on."""


def pretrain(config: WordsConfig) -> None:
    """Train, save and measure the checkpoint."""
    device, seed = device_named(config.device), config.seed
    data = f"{config.images} images, {config.mistakes:g} mistakes"
    tokenizer = build_tokenizer(config.output / "tokenizer", KNOWN, MAX_TOKENS)
    drawn, captions = training_images(seed_of(seed, 0), config.images, mistakes=config.mistakes)
    images = channels_first(drawn).to(device)
    vae = train_vae(
        images, config.output / "vae", config.vae, data=data, seed=seed, build=build_vae, batch=VAE_BATCH, l1_weight=0.0
    )
    networks = seeded(seed, lambda: build_text_to_latent(tokenizer)).to(device)
    captioned = Captioned(encode(vae, images), *(token_ids(tokenizer, texts, device) for texts in (captions, [""])))
    loss_of = partial(denoising_loss, networks)
    train(config.output / "denoiser", networks, captioned.draw, loss_of, config.denoiser, data=data, seed=seed)
    folder = config.output / "checkpoint"
    save_pipeline(assemble(StableDiffusionPipeline, vae, networks, tokenizer), folder, KNOWN)
    if config.evaluate:
        write_evaluation(folder, evaluate_checkpoint(folder, config.evaluate, seed=seed, device=device))


if __name__ == "__main__":
    pretrain(from_command_line(WordsConfig, __doc__))
