"""Train the proxy reward from nothing, a small CLIPModel (arXiv:2103.00020): `python -m scripts.shapes.pretrain_proxy`.

The loss is CLIP's, in both directions over one batch, with two differences that a world of few sentences asks for:

- Several captions of a batch may hold of one image. Each of them is matched against the wrong ones only:
  loss(row) = mean over right j of -log(exp(s_j) / (exp(s_j) + sum over wrong k of exp(s_k))).
- A batch is made of families (`scripts.shapes.proxy_scenes`), so that among the wrong ones there always are some that
  differ in one attribute, number or relation. A near miss that no sentence describes takes part as a wrong image.

Half of the images are seen as rendered and half as the base's autoencoder decodes them, from latents with a little
noise: what a policy draws has such smears, and a proxy that never met one would reward or punish them at will. The
result is an honest stand-in for CLIPScore or PickScore: a learned score that agrees with the verifier often, not
always, and that can be gamed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTokenizer

from rpo.config.ranges import Count, Seed, Text, WholeNumber
from rpo.config.settings import settings
from rpo.devices import device_named
from rpo.shapes import path
from rpo.training.loop import LoopConfig
from scripts.shapes.evaluate import decode_noisy, evaluate_proxy, to_pixel_values
from scripts.shapes.networks import (
    build_proxy,
    build_tokenizer,
    save_proxy,
    seeded,
    token_ids,
    world_words,
    write_evaluation,
)
from scripts.shapes.proxy_scenes import FAMILY_SIZE, Families, draw_families, known_prompts
from scripts.shapes.training import from_command_line, seed_of, train
from scripts.shapes.vae import channels_first

BATCH_FAMILIES = 16
MAX_LOGIT_SCALE = 100.0
"""CLIP's bound on the factor of the cosine."""


@settings
class PretrainProxyConfig:
    """Everything that a run depends on."""

    output: Path = Path("runs/shapes-proxy")
    """The training, which goes on after a kill, and the finished folder of a CLIPModel, `checkpoint`."""
    device: Text = "auto"
    """Device of training; "auto" takes the GPU when there is one."""
    seed: Seed = 0
    """Determines scenes, initial weights and batches."""
    families: Count = 5000
    """Families of four scenes, drawn once and used over and over; 2,000 to 20,000."""
    stop: WholeNumber = 2000
    """Updates after which to finish, short of the schedule's end; 0 for all of `loop.updates`."""
    evaluate: WholeNumber = 200
    """Families that no training sees, and prompts of each split, to measure the result; 0 skips it."""
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(2400, 1e-3, "cosine", 720, adam_beta2=0.98, weight_decay=0.05, log_every=50)
    )
    """How the model is trained."""


@dataclass(frozen=True)
class Batch:
    """What one update learns from."""

    pixels: Tensor
    token_ids: Tensor
    holds: Tensor
    """[images, captions]"""


@dataclass(frozen=True)
class Data:
    """The training set on its device."""

    images: Tensor
    """uint8 [2, scenes, 3, 64, 64]: as rendered, and as the autoencoder decodes them."""
    holds: Tensor
    """[scenes, sentences]: whether a sentence holds of a scene."""
    token_ids: Tensor
    """[sentences, tokens]"""

    def draw(self, generator: torch.Generator, families: int = BATCH_FAMILIES) -> Batch:
        """Draw whole families, each image as rendered or as decoded, and one caption per image.

        The caption of an image is one that holds of it; where none does, one of its family's first scene.
        """
        device = self.holds.device
        chosen = torch.randint(len(self.holds) // FAMILY_SIZE, (families, 1), generator=generator, device=device)
        rows = (chosen * FAMILY_SIZE + torch.arange(FAMILY_SIZE, device=device)).flatten()
        is_decoded = torch.randint(2, rows.shape, generator=generator, device=device)
        holds = self.holds[rows]
        first = holds[::FAMILY_SIZE].repeat_interleave(FAMILY_SIZE, 0)
        eligible = torch.where(holds.any(1, keepdim=True), holds, first)
        captions = torch.multinomial(eligible.float(), 1, generator=generator).flatten()
        return Batch(self.images[is_decoded, rows], self.token_ids[captions], holds[:, captions])


def pretrain_proxy(config: PretrainProxyConfig) -> None:
    """Train, save and measure the proxy."""
    device, seed = device_named(config.device), config.seed
    tokenizer = build_tokenizer(config.output / "tokenizer", world_words())
    families = draw_families(seed_of(seed, 0), config.families)
    data = prepare(families, tokenizer, seed=seed_of(seed, 2), device=device)
    model = seeded(seed, build_proxy).to(device)
    done = 0

    def loss_of(batch: Batch) -> Tensor:
        output = model(input_ids=batch.token_ids, pixel_values=to_pixel_values(batch.pixels))
        return contrastive_loss(output.logits_per_image, batch.holds)

    @torch.no_grad()
    def bound(update: int, _: dict[str, float]) -> None:
        nonlocal done
        done = update
        model.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))

    def guard(_: dict[str, float]) -> str | None:
        return f"stop={config.stop}" if done == config.stop else None

    hooks: Any = {"on_update": bound, "guard": guard}
    words = f"{config.families} families"
    train(config.output / "proxy", model, data.draw, loss_of, config.loop, data=words, seed=seed, **hooks)
    folder = config.output / "checkpoint"
    save_proxy(model, tokenizer, folder)
    if config.evaluate:
        held_out = draw_families(seed_of(seed, 1), config.evaluate)
        write_evaluation(folder, evaluate_proxy(folder, held_out, config.evaluate, seed=seed, device=device))


def prepare(families: Families, tokenizer: CLIPTokenizer, *, seed: int, device: torch.device) -> Data:
    """Put the training set on its device."""
    rendered = channels_first(families.images)
    vae = AutoencoderKL.from_pretrained(str(path()), subfolder="vae").to(device).requires_grad_(False)
    images = torch.stack([rendered, decode_noisy(vae, rendered, seed)])
    sentences = [prompt.text for prompt in known_prompts()]
    ids = token_ids(tokenizer, sentences, device)
    return Data(images.to(device), truth_table(families, sentences).to(device), ids)


def truth_table(families: Families, sentences: Sequence[str]) -> Tensor:
    """Which of `sentences` hold of each scene, [scenes, sentences]."""
    index = {sentence: column for column, sentence in enumerate(sentences)}
    holds = torch.zeros(len(families.captions), len(sentences), dtype=torch.bool)
    for row, captions in enumerate(families.captions):
        holds[row, [index[caption] for caption in captions]] = True
    return holds


def contrastive_loss(logits: Tensor, holds: Tensor) -> Tensor:
    """CLIP's loss where several captions may hold of an image, and several images of a caption.

    Args:
        holds: Which captions hold of which images, of the same shape.
    """
    return (_matching_loss(logits, holds) + _matching_loss(logits.T, holds.T)) / 2


def _matching_loss(logits: Tensor, is_right: Tensor) -> Tensor:
    """Mean over right entries, weighted so that each row with any counts once, of -log softmax against wrong ones."""
    wrong = logits.masked_fill(is_right, -torch.inf).logsumexp(1, keepdim=True)
    losses = functional.softplus(wrong - logits)
    count = is_right.sum(1)
    per_row = losses.masked_fill(~is_right, 0).sum(1) / count.clamp(min=1)
    return per_row.sum() / (count > 0).sum().clamp(min=1)


if __name__ == "__main__":
    pretrain_proxy(from_command_line(PretrainProxyConfig, __doc__))
