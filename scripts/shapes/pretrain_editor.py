"""Train the shapes editor from the embedded checkpoint: `python -m scripts.shapes.pretrain_editor output=FOLDER`.

As in InstructPix2Pix (Brooks et al., arXiv:2211.09800, section 3.2.1) the UNet learns to denoise the edited scene from
the source and the instruction: its first convolution gets channels for the source's latents whose weights start at
zero. The text encoder learns along, because the base has never seen an instruction: it gets embeddings for the words of
the edit language and for more positions, and keeps what it knows. The loss is weighted by min(SNR, 5) / SNR: what an
edit does is decided where the noise is strong, and plain epsilon-matching spends its gradient where it is weak.
"""

from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rpo.config.ranges import Count, Seed, Text, WholeNumber
from rpo.config.settings import settings
from rpo.devices import device_named
from rpo.shapes import editor_path, path
from rpo.shapes.edits import edit_words
from rpo.shapes.world import Scene, render
from rpo.training.loop import LoopConfig
from scripts.shapes.edit_world import triples
from scripts.shapes.evaluate import evaluate_editor
from scripts.shapes.networks import (
    TextToLatent,
    assemble,
    build_tokenizer,
    save_pipeline,
    seeded,
    token_ids,
    world_words,
    write_evaluation,
)
from scripts.shapes.training import Noisy, denoising_loss, from_command_line, noisy, seed_of, train
from scripts.shapes.vae import Moments, channels_first, decode, encode

BATCH = 48
SNR_LIMIT = 5.0
"""Signal-to-noise ratio from which a step counts less; the value of the paper."""

MAX_TOKENS = 24
"""Length of an instruction with both ends; two sentences need 22 at most, unless both are long moves."""

NEW_EMBEDDING_STD = 0.02
"""Of embeddings for the words and positions that the base has not: that of CLIP's own start."""

NO_IMAGE_RATE = NO_TEXT_RATE = NEITHER_RATE = 0.05
"""Shares of the batch without source, without instruction and without both, for guidance by each of them; those of
InstructPix2Pix."""

DISTURBANCE = 0.1
"""Standard deviation of the noise on the (unit scale) latents of every other source, which is then encoded from what
they decode to: what the editor will be given is drawn by a model and not rendered."""


@settings
class PretrainEditorConfig:
    """Everything that a run depends on."""

    output: Path = Path("runs/shapes-editor")
    """The training, which goes on after a kill, and the finished diffusers folder `checkpoint`."""
    device: Text = "auto"
    """Device of training and evaluation; "auto" takes the GPU when there is one."""
    seed: Seed = 0
    """Determines triples, new weights and noise."""
    triples: Count = 24_000
    """Triples drawn once and used over and over; 20,000 to 200,000."""
    evaluate: WholeNumber = 400
    """Edits to measure the result, with known and as many with held-out sentences; 0 skips it."""
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(
            10_000, 1e-3, "constant", 100, adam_beta2=0.99, weight_decay=0.01, ema_decay=0.9995, log_every=50
        )
    )
    """How UNet and text encoder are trained; the updates may be raised for a run that is to go on."""


@dataclass(frozen=True)
class Instructed:
    """The training set on its device."""

    source: Tensor
    """Latents of the sources as the pipeline takes them: the mode of the posterior, not scaled."""
    edited: Moments
    token_ids: Tensor
    empty_ids: Tensor

    def draw(self, generator: torch.Generator, size: int = BATCH) -> Noisy:
        """Draw triples, times, noise and which of them go without a source, an instruction or both."""
        device = self.source.device
        picked = torch.randint(len(self.source), (size,), generator=generator, device=device)
        chance = torch.rand(size, generator=generator, device=device)
        has_no_text = chance < NO_TEXT_RATE + NEITHER_RATE
        has_no_image = (chance >= NO_TEXT_RATE) & (chance < NO_TEXT_RATE + NEITHER_RATE + NO_IMAGE_RATE)
        source = self.source[picked] * ~has_no_image.view(-1, 1, 1, 1)
        instructions = torch.where(has_no_text.view(-1, 1), self.empty_ids, self.token_ids[picked])
        return noisy(self.edited.draw(picked, generator), instructions, generator, beside=source)


def pretrain_editor(config: PretrainEditorConfig) -> None:
    """Train, save and measure the editor."""
    device, seed, words = device_named(config.device), config.seed, world_words() | edit_words()
    base = StableDiffusionPipeline.from_pretrained(str(path())).to(device)
    tokenizer = build_tokenizer(config.output / "tokenizer", words, MAX_TOKENS)
    text_encoder = seeded(seed, lambda: extend_text_encoder(base.text_encoder, base.tokenizer, tokenizer))
    networks = TextToLatent(widen_unet(base.unet), text_encoder).to(device)
    instructed = draw_instructed(base.vae, tokenizer, config.triples, seed_of(seed, 0))
    loss_of, data = partial(denoising_loss, networks, snr_limit=SNR_LIMIT), f"{config.triples} triples"
    train(config.output / "editor", networks, instructed.draw, loss_of, config.loop, data=data, seed=seed)
    pipe = assemble(StableDiffusionInstructPix2PixPipeline, base.vae, networks, tokenizer)
    folder = config.output / "checkpoint"
    save_pipeline(pipe, folder, words)
    if config.evaluate:
        write_evaluation(folder, evaluate_editor(pipe, cases=config.evaluate, seed=seed))


def widen_unet(base: UNet2DConditionModel) -> UNet2DConditionModel:
    """The base's UNet with channels for the source's latents after its own; it ignores them until it has learned."""
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(str(editor_path()), subfolder="unet"))
    weights = base.state_dict()
    first = weights["conv_in.weight"]
    unet.load_state_dict({**weights, "conv_in.weight": torch.cat([first, torch.zeros_like(first)], dim=1)})
    return unet


def extend_text_encoder(base: CLIPTextModel, words: CLIPTokenizer, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The base's text encoder, whose tokenizer is `words`, for another one: what both know keeps its embedding."""
    encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(str(editor_path()), subfolder="text_encoder"))
    weights = {key: value.clone() for key, value in encoder.state_dict().items()}
    known, own = words.get_vocab(), tokenizer.get_vocab()
    shared = sorted(set(known) & set(own))
    for key, value in base.state_dict().items():
        if key.endswith("token_embedding.weight"):
            weights[key].normal_(std=NEW_EMBEDDING_STD)
            weights[key][[own[word] for word in shared]] = value[[known[word] for word in shared]].cpu()
        elif key.endswith("position_embedding.weight"):
            weights[key].normal_(std=NEW_EMBEDDING_STD)
            weights[key][: len(value)] = value.cpu()
        else:
            weights[key] = value
    encoder.load_state_dict(weights)
    return encoder


def draw_instructed(vae: AutoencoderKL, tokenizer: CLIPTokenizer, count: int, seed: int) -> Instructed:
    """Draw and encode a training set on the device of `vae`; no instruction of it has a held-out sentence."""
    drawn = list(islice(triples(seed), count))
    source = encode(vae, rendered([triple.source for triple in drawn])).mean
    source[::2] = disturbed(vae, source[::2], torch.Generator(vae.device).manual_seed(seed_of(seed, count)))
    edited = encode(vae, rendered([triple.edited for triple in drawn]))
    ids = (token_ids(tokenizer, texts, vae.device) for texts in ([one.instruction for one in drawn], [""]))
    return Instructed(source / vae.config.scaling_factor, edited, *ids)


def rendered(scenes: list[Scene]) -> Tensor:
    """The scenes as uint8 [count, 3, 64, 64]."""
    return channels_first(np.stack([render(scene) for scene in scenes]))


def disturbed(vae: AutoencoderKL, latents: Tensor, generator: torch.Generator) -> Tensor:
    """Scaled latents of the images that slightly wrong latents decode to."""
    noise = torch.randn(latents.shape, generator=generator, device=latents.device)
    return encode(vae, decode(vae, latents + DISTURBANCE * noise) * 255).mean


if __name__ == "__main__":
    pretrain_editor(from_command_line(PretrainEditorConfig, __doc__))
