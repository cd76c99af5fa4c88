"""The networks of the embedded checkpoint: real diffusers and transformers classes, sized for two CPU cores.

The scale is the world's (64x64 images of a few flat objects, prompts of at most ten words), the structure is Stable
Diffusion's: a byte-level CLIP tokenizer and text model, an AutoencoderKL that shrinks 8 times, a UNet that reads the
prompt through cross-attention in every block, and a DDIM scheduler with Stable Diffusion's noise schedule.
"""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rpo.files import replace_folder
from rpo.text import write_text

MAX_TOKENS = 16
"""Prompt length with both ends. The longest prompt of the world needs twelve, and every token costs time."""

START, END = "<|startoftext|>", "<|endoftext|>"
TEXT_WIDTH = 96
LATENT_CHANNELS = 4


def word_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges under which each of `words` becomes one token.

    A merge added late never disturbs a word that is whole already, because byte-pair encoding applies the earliest
    merge first; so the words are completed one after another.
    """
    merges: list[tuple[str, str]] = []
    for word in sorted(set(words)):
        pieces = _apply_merges(word, merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = _apply_merges(word, merges)
    return merges


def _apply_merges(word: str, merges: list[tuple[str, str]]) -> list[str]:
    pieces = [*word[:-1], word[-1] + "</w>"]
    for left, right in merges:
        index = 0
        while index < len(pieces) - 1:
            if (pieces[index], pieces[index + 1]) == (left, right):
                pieces[index : index + 2] = [left + right]
            index += 1
    return pieces


def write_tokenizer(folder: Path, words: Iterable[str]) -> None:
    """Write `vocab.json` and `merges.txt` of a CLIP tokenizer that knows `words` whole and any other text by its bytes.

    The order is CLIP's: bytes, bytes that end a word, merges, start, end.
    """
    merges = word_merges(words)
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(char + "</w>" for char in alphabet), *(left + right for left, right in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "vocab.json", json.dumps({token: index for index, token in enumerate(tokens)}))
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    write_text(folder / "merges.txt", "\n".join(lines) + "\n")


def build_tokenizer(folder: Path, words: Iterable[str]) -> CLIPTokenizer:
    """Make the tokenizer of the checkpoint from files that it leaves in `folder`."""
    write_tokenizer(folder, words)
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=MAX_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Make an untrained text model of two layers for the vocabulary of `tokenizer`."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_vae() -> AutoencoderKL:
    """Make an untrained autoencoder of about one million parameters: 64x64 RGB to 8x8x4 latents."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=64,
    )


def build_unet() -> UNet2DConditionModel:
    """Make an untrained denoiser of about 2.4 million parameters on 8x8x4 latents."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 96),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Make a DDIM scheduler with the noise schedule and the conventions of Stable Diffusion."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def assemble(
    vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """Put the networks together as a pipeline without a safety checker: flat circles and squares need none."""
    return StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_checkpoint(pipe: DiffusionPipeline, folder: Path, words: Iterable[str]) -> None:
    """Write `pipe` as a folder with half-precision weights; an existing `folder` is replaced in one move.

    The configurations keep saying float32, so that a plain `from_pretrained` gives every component the same dtype:
    transformers would otherwise load the text encoder in the dtype of its file, and diffusers the UNet in float32.

    Args:
        words: The words that the tokenizer knows whole; its two classic files are written beside `tokenizer.json`,
            so that a transformers that reads only those loads it as well.
    """
    draft = folder.with_name(folder.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    pipe.save_pretrained(draft, safe_serialization=True)
    write_tokenizer(draft / "tokenizer", words)
    for network in ("unet", "vae"):
        _rewrite(draft / network / "diffusion_pytorch_model.safetensors", lambda key: key)
    _rewrite(draft / "text_encoder" / "model.safetensors", _published_text_key)
    replace_folder(draft, folder)


def _published_text_key(key: str) -> str:
    """The name that published Stable Diffusion text encoders use: a fresh `CLIPTextModel` lacks the first level."""
    return key if key.startswith("text_model.") else f"text_model.{key}"


def _rewrite(file: Path, rename: Callable[[str], str]) -> None:
    halved: dict[str, Tensor] = {}
    for key, value in load_file(file).items():
        halved[rename(key)] = value.to(torch.float16) if value.is_floating_point() else value
    save_file(halved, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors leaves it readable by its owner alone, which a shared installation cannot load
