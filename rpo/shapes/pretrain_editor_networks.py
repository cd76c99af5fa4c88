"""The networks of the shapes editor: those of the embedded checkpoint, made to read a source image and an instruction.

As in InstructPix2Pix (Brooks et al., arXiv:2211.09800, section 3.2.1), the UNet's first convolution gets channels for
the source's latents whose weights start at zero, so that the untrained editor denoises exactly as the base does. The
text encoder learns along, because the base has never seen an instruction: it gets embeddings for the words of the edit
language and for more positions, and keeps what it knows. The autoencoder is the base's, unchanged.
"""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rpo.shapes import path
from rpo.shapes.edits import edit_words
from rpo.shapes.networks import LATENT_CHANNELS, build_scheduler, write_tokenizer
from rpo.shapes.pretrain import world_words

MAX_TOKENS = 24
"""Length of an instruction with both ends; two sentences need 22 at most, unless both are long moves."""

NEW_EMBEDDING_STD = 0.02
"""Of embeddings for the words and positions that the base has not: that of CLIP's own start."""


def editor_words() -> set[str]:
    """Every word that the editor's tokenizer knows whole: the base's, and those of the edit language."""
    return world_words() | edit_words()


def build_editor_tokenizer(folder: Path) -> CLIPTokenizer:
    """Make the editor's tokenizer from files that it leaves in `folder`."""
    write_tokenizer(folder, editor_words())
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=MAX_TOKENS)


def load_base() -> StableDiffusionPipeline:
    """The embedded checkpoint, from which the editor starts."""
    return StableDiffusionPipeline.from_pretrained(str(path()))


def widen_unet(base: UNet2DConditionModel) -> UNet2DConditionModel:
    """The base's UNet with channels for the source's latents after its own; it ignores them until it has learned.

    Args:
        base: A denoiser of latents alone; it is left as it is.
    """
    unet = UNet2DConditionModel.from_config({**base.config, "in_channels": 2 * LATENT_CHANNELS})
    weights = base.state_dict()
    first = weights["conv_in.weight"]
    unet.load_state_dict({**weights, "conv_in.weight": torch.cat([first, torch.zeros_like(first)], dim=1)})
    return unet


def extend_text_encoder(base: CLIPTextModel, words: CLIPTokenizer, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The base's text encoder for another tokenizer: what both know keeps its embedding.

    Args:
        base: The text encoder to start from; it is left as it is.
        tokenizer: The tokenizer of the result; its order and length may be others.
    """
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    ends = {f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("bos", "eos", "pad")}
    encoder = CLIPTextModel(CLIPTextConfig(**{**base.config.to_dict(), **sizes, **ends}))
    weights = {key: value.clone() for key, value in encoder.state_dict().items()}
    known, own = words.get_vocab(), tokenizer.get_vocab()
    for key, value in base.state_dict().items():
        if key.endswith("token_embedding.weight"):
            weights[key].normal_(std=NEW_EMBEDDING_STD)
            shared = sorted(set(known) & set(own))
            weights[key][[own[word] for word in shared]] = value[[known[word] for word in shared]]
        elif key.endswith("position_embedding.weight"):
            weights[key].normal_(std=NEW_EMBEDDING_STD)
            weights[key][: len(value)] = value
        else:
            weights[key] = value
    encoder.load_state_dict(weights)
    return encoder


def assemble_editor(
    vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> StableDiffusionInstructPix2PixPipeline:
    """Put the networks together as a pipeline without a safety checker."""
    return StableDiffusionInstructPix2PixPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
