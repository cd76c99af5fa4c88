"""The networks of the shipped weights: real diffusers and transformers classes, sized for two CPU cores.

The scale is the world's (64x64 images of a few flat objects, prompts of at most ten words), the structure is Stable
Diffusion's: a byte-level CLIP tokenizer and text model, an AutoencoderKL that shrinks 8 times, a UNet that reads the
prompt through cross-attention in every block, and a DDIM scheduler with Stable Diffusion's noise schedule. Their sizes
are those in the configurations of `rpo/shapes/assets`.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import (
    AmusedScheduler,
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    UNet2DConditionModel,
    UVit2DModel,
    VQModel,
)
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from rpo.files.text import write_text
from rpo.files.whole import replace_folder
from rpo.shapes import PROXY, TOKENS, path
from rpo.shapes.prompts import prompts

MAX_TOKENS = 16
"""Prompt length with both ends. The longest prompt of the world needs twelve, and every token costs time."""

START, END = "<|startoftext|>", "<|endoftext|>"

T = TypeVar("T", bound=torch.nn.Module)


class TextToLatent(torch.nn.Module):
    """The two networks that learn together: a text encoder, and a denoiser that reads its states."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        """Take the networks as they are."""
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, inputs: Tensor, timestep: Tensor, token_ids: Tensor) -> Tensor:
        """The predicted noise."""
        return self.unet(inputs, timestep, self.text_encoder(token_ids)[0], return_dict=False)[0]


def seeded(seed: int, build: Callable[[], T]) -> T:
    """What `build` makes with the global generator at `seed`, which is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def build_vae() -> AutoencoderKL:
    """Make an untrained autoencoder of about one million parameters: 64x64 RGB to 8x8x4 latents."""
    return AutoencoderKL.from_config(AutoencoderKL.load_config(str(path()), subfolder="vae"))


def build_text_to_latent() -> TextToLatent:
    """Make an untrained denoiser of about 2.4 million parameters, and a text encoder of two layers."""
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(str(path()), subfolder="unet"))
    return TextToLatent(unet, CLIPTextModel(CLIPTextConfig.from_pretrained(str(path()), subfolder="text_encoder")))


def build_vq() -> VQModel:
    """Make an untrained VQ model of about one million parameters: 64x64 RGB to 8x8 tokens of a codebook of 256."""
    return VQModel.from_config(VQModel.load_config(str(TOKENS), subfolder="vqvae"))


def build_token_denoiser() -> UVit2DModel:
    """Make an untrained token denoiser of about 2.7 million parameters."""
    return UVit2DModel.from_config(UVit2DModel.load_config(str(TOKENS), subfolder="transformer"))


def build_proxy() -> CLIPModel:
    """Make an untrained CLIP model of about 1.3 million parameters: 64 patches of 8 x 8 pixels, two text layers."""
    return CLIPModel(CLIPConfig.from_pretrained(str(PROXY)))


@cache
def build_scheduler() -> DDIMScheduler:
    """Make a DDIM scheduler with the noise schedule and the conventions of Stable Diffusion."""
    return DDIMScheduler.from_pretrained(str(path()), subfolder="scheduler")


@cache
def build_mask_scheduler() -> AmusedScheduler:
    """Make aMUSEd's scheduler: tokens appear along a cosine, the most confident first."""
    return AmusedScheduler.from_pretrained(str(TOKENS), subfolder="scheduler")


def build_projected_text_encoder() -> CLIPTextModelWithProjection:
    """The checkpoint's text encoder in the class that AmusedPipeline takes; its projection is the identity."""
    base = CLIPTextModel.from_pretrained(str(path()), subfolder="text_encoder", dtype=torch.float32)
    made = CLIPTextModelWithProjection(base.config)
    learnt = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in base.state_dict().items()}
    made.load_state_dict({**learnt, "text_projection.weight": torch.eye(base.config.projection_dim)})
    return made.eval().requires_grad_(False)


def world_words() -> set[str]:
    """Every word of the world's prompts, which a tokenizer shall know whole."""
    known = [*prompts("train"), *prompts("in_domain"), *prompts("out_of_domain")]
    return {word for prompt in known for word in prompt.text.split()}


def word_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges under which each of `words` becomes one token.

    A merge added late never disturbs a word that is whole already, because byte-pair encoding applies the earliest
    merge first; so the words are completed one after another.
    """
    merges: list[tuple[str, str]] = []
    for word in sorted(set(words)):
        while len(pieces := _apply_merges(word, merges)) > 1:
            merges.append((pieces[0], pieces[1]))
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


def build_tokenizer(folder: Path, words: Iterable[str], max_tokens: int = MAX_TOKENS) -> CLIPTokenizer:
    """Make a tokenizer from files that it leaves in `folder`."""
    write_tokenizer(folder, words)
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=max_tokens)


def token_ids(tokenizer: CLIPTokenizer, texts: list[str], device: torch.device | str) -> Tensor:
    """Texts as the networks read them, all of one length."""
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)


def assemble(pipeline: Any, vae: AutoencoderKL, networks: TextToLatent, tokenizer: CLIPTokenizer) -> Any:
    """Put networks together as a pipeline of that class, without a safety checker: flat circles need none."""
    without = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    learnt = {"unet": networks.unet, "text_encoder": networks.text_encoder}
    return pipeline(vae=vae, tokenizer=tokenizer, scheduler=build_scheduler(), **learnt, **without)


def save_pipeline(pipe: DiffusionPipeline, folder: Path, words: Iterable[str]) -> None:
    """Write a pipeline with half-precision weights; an existing `folder` is replaced in one move.

    The configurations keep saying float32, so that a plain `from_pretrained` gives every component the same dtype:
    transformers would otherwise load the text encoder in the dtype of its file, and diffusers the UNet in float32.

    Args:
        words: The words that the tokenizer knows whole; its two classic files are written beside `tokenizer.json`,
            so that a transformers that reads only those loads it as well.
    """
    draft = draft_of(folder)
    pipe.save_pretrained(draft, safe_serialization=True)
    write_tokenizer(draft / "tokenizer", words)
    _finish(draft, folder)


def save_proxy(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write the proxy as a folder of a CLIPModel, as `save_pipeline` does."""
    draft = draft_of(folder)
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    write_tokenizer(draft, world_words())
    shutil.copy(PROXY / "preprocessor_config.json", draft)
    _finish(draft, folder)


def draft_of(folder: Path) -> Path:
    """Where a folder is written before it takes its place; it is not there."""
    draft = folder.with_name(folder.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    return draft


def _finish(draft: Path, folder: Path) -> None:
    for file in draft.rglob("*.safetensors"):
        _halve(file, is_text_encoder=file.parent.name == "text_encoder")
    replace_folder(draft, folder)


def _halve(file: Path, *, is_text_encoder: bool) -> None:
    """Half precision, and for a text encoder the names of published ones: a fresh one lacks their first level."""
    halved: dict[str, Tensor] = {}
    for key, value in load_file(file).items():
        is_bare = is_text_encoder and not key.startswith(("text_model.", "text_projection."))
        name = f"text_model.{key}" if is_bare else key
        halved[name] = value.to(torch.float16) if value.is_floating_point() else value
    save_file(halved, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors leaves it readable by its owner alone, which a shared installation cannot load


def write_evaluation(folder: Path, evaluation: Mapping[str, Any]) -> None:
    """Say what was measured, here and beside the weights."""
    text = json.dumps(evaluation, indent=2)
    write_text(folder / "evaluation.json", text + "\n")
    print(text)
