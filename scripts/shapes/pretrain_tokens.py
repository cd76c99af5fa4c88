"""Train the embedded masked-token generator (MaskGIT, arXiv:2202.04200): `python -m scripts.shapes.pretrain_tokens`.

It is a small aMUSEd (arXiv:2401.01808): a VQ model turns images into grids of 8 x 8 tokens, and a transformer learns to
tell masked tokens from the others and the prompt. A grid loses the share cos(pi u / 2) of its tokens, u uniform in
(0, 1), and the loss is the cross-entropy of what was lost. The text encoder is the checkpoint's and is not trained. One
caption in ten is emptied, for guidance. The learning rate stays constant, and a moving average of the weights does what
a decay would do. Training ends while the generator still leaves room to alignment.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AmusedPipeline, AutoencoderKL, UVit2DModel
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from rpo.config.ranges import Count, Seed, Text, WholeNumber
from rpo.config.settings import settings
from rpo.devices import device_named
from rpo.shapes import path
from rpo.shapes.world import IMAGE_SIZE, training_scenes
from rpo.training.loop import LoopConfig
from scripts.shapes.evaluate import evaluate_tokens
from scripts.shapes.networks import (
    build_mask_scheduler,
    build_projected_text_encoder,
    build_token_denoiser,
    build_tokenizer,
    save_pipeline,
    seeded,
    token_ids,
    world_words,
    write_evaluation,
)
from scripts.shapes.training import from_command_line, seed_of, train
from scripts.shapes.vae import channels_first
from scripts.shapes.vq import encode_tokens, make_vq

BATCH = 16
EMPTY_CAPTION_RATE = 0.1

MICRO_CONDITIONS = (float(IMAGE_SIZE), float(IMAGE_SIZE), 0.0, 0.0, 6.0)
"""Size, crop and aesthetic score that AmusedPipeline tells the transformer, at its defaults."""


@settings
class PretrainTokensConfig:
    """Everything that a run depends on."""

    output: Path = Path("runs/shapes-tokens")
    """The training, which goes on after a kill, and the finished diffusers folder `checkpoint`."""
    device: Text = "auto"
    """Device of training and evaluation; "auto" takes the GPU when there is one."""
    seed: Seed = 0
    """Determines scenes, codebook, initial weights and masks."""
    scenes: Count = 16_384
    """Scenes drawn once and used over and over; 10,000 to 100,000."""
    evaluate: WholeNumber = 400
    """Images drawn per split to measure the result; 0 skips it."""
    denoiser: LoopConfig = field(
        default_factory=lambda: LoopConfig(
            6689, 1e-3, "constant", 100, adam_beta2=0.99, weight_decay=0.01, ema_decay=0.997, log_every=50
        )
    )
    """How the transformer is trained; the updates may be raised for a run that is to go on."""


class Told(NamedTuple):
    """Prompts as the transformer reads them."""

    states: Tensor
    """[prompts, words, dims]: what the text encoder's last layer but one says of each word."""
    pooled: Tensor
    """[prompts, dims]"""


class Masked(NamedTuple):
    """What the transformer trains on."""

    tokens: Tensor
    is_masked: Tensor
    told: Told


@dataclass(frozen=True)
class Captioned:
    """The training set on its device."""

    tokens: Tensor
    told: Told
    """Of each caption once, the empty one last."""
    caption: Tensor
    """Which of these each image has."""

    def draw(self, generator: torch.Generator, size: int = BATCH) -> Masked:
        """Draw images, captions and masks."""
        device = self.tokens.device
        picked = torch.randint(len(self.tokens), (size,), generator=generator, device=device)
        is_empty = torch.rand(size, generator=generator, device=device) < EMPTY_CAPTION_RATE
        caption = torch.where(is_empty, len(self.told.pooled) - 1, self.caption[picked])
        tokens = self.tokens[picked]
        told = Told(*(values[caption] for values in self.told))
        return Masked(tokens, draw_masks(tokens.shape, generator), told)


def pretrain_tokens(config: PretrainTokensConfig) -> None:
    """Train, save and measure the generator."""
    device, seed, data = device_named(config.device), config.seed, f"{config.scenes} scenes"
    tokenizer = build_tokenizer(config.output / "tokenizer", world_words())
    text_encoder = build_projected_text_encoder().to(device)
    scenes, captions = training_scenes(seed_of(seed, 0), config.scenes)
    images = channels_first(scenes).to(device)
    vae = AutoencoderKL.from_pretrained(str(path()), subfolder="vae").to(device).requires_grad_(False)
    vq = make_vq(vae, images, torch.Generator(device).manual_seed(seed_of(seed, 3)))
    tokens = encode_tokens(vq, images)
    transformer = seeded(seed, build_token_denoiser).to(device)
    captioned = captioned_tokens(tokens, captions, tokenizer, text_encoder)
    loss_of = partial(masked_loss, transformer)
    train(config.output / "denoiser", transformer, captioned.draw, loss_of, config.denoiser, data=data, seed=seed)
    folder = config.output / "checkpoint"
    pipe = AmusedPipeline(vq, tokenizer, text_encoder, transformer, build_mask_scheduler())
    save_pipeline(pipe, folder, world_words())
    if config.evaluate:
        write_evaluation(folder, evaluate_tokens(folder, config.evaluate, seed=seed, device=device))


def captioned_tokens(
    tokens: Tensor, captions: list[str], tokenizer: CLIPTokenizer, text_encoder: CLIPTextModelWithProjection
) -> Captioned:
    """The training set, on the device of the tokens; every caption is read once, because the reader stays as it is."""
    texts = [*sorted(set(captions)), ""]
    index = {text: row for row, text in enumerate(texts)}
    read = tell(token_ids(tokenizer, texts, tokens.device), text_encoder)
    return Captioned(tokens, read, torch.tensor([index[text] for text in captions], device=tokens.device))


@torch.no_grad()
def tell(ids: Tensor, text_encoder: CLIPTextModelWithProjection) -> Told:
    """What AmusedPipeline takes from the text encoder."""
    found = text_encoder(ids, output_hidden_states=True)
    return Told(found.hidden_states[-2], found.text_embeds)


def draw_masks(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Which tokens of grids [count, rows, columns] are masked: max(1, floor(cos(pi u / 2) tokens)), u of each grid."""
    count, size = shape[0], shape[1:].numel()
    u = torch.rand(count, 1, generator=generator, device=generator.device)
    number = (torch.cos(math.pi / 2 * u) * size).floor().clamp(min=1)
    order = torch.rand(count, size, generator=generator, device=generator.device).argsort(1).argsort(1)
    return (order < number).view(shape)


def masked_loss(transformer: UVit2DModel, batch: Masked) -> Tensor:
    """Cross-entropy of the masked tokens, each counted once."""
    mask_token_id = transformer.config.vocab_size - 1
    seen = batch.tokens.masked_fill(batch.is_masked, mask_token_id)
    micro = torch.tensor(MICRO_CONDITIONS, device=seen.device).expand(len(seen), -1)
    logits = transformer(seen, batch.told.states, batch.told.pooled, micro)
    losses = functional.cross_entropy(logits, batch.tokens, reduction="none")
    return losses[batch.is_masked].mean()


if __name__ == "__main__":
    pretrain_tokens(from_command_line(PretrainTokensConfig, __doc__))
