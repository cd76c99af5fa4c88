"""FLUX.2 [klein] base: a transformer that predicts flow, three hidden layers of Qwen3 as its text, 16 x 16 px cells.

A cell of the latents is 2 x 2 of the autoencoder's, and has mean 0 and variance 1 by the batch norm inside that. A
prompt is put into Qwen3's chat template; no mask travels with its 512 tokens, for the network attends to all. The same
network edits: an image to edit comes after its own tokens.
"""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from rpo.models import latents as autoencoder
from rpo.models.base import ORIGINAL, Edits, TextContext
from rpo.models.families.usual import UsualFamily
from rpo.models.schedules import FlowSchedule, even_sigmas
from rpo.types import Embedding, Images, Latents

TOKENS = 512
"""As in the pipeline's own call."""

FIRST_ORIGINAL = 10
"""Number of the first image that is edited, where the image itself has 0."""

MANY_TOKENS = 4300
"""Above, the shift does not depend on the number of steps."""


@final
class Flux2Klein(UsualFamily):
    """The family of `Flux2KleinPipeline`."""

    name = "FLUX.2 [klein] base"
    pipelines: tuple[str, ...] = ("Flux2KleinPipeline",)
    parts: Mapping[str, str] = {"transformer": "Flux2Transformer2DModel", "vae": "AutoencoderKLFlux2"}
    single_file_key = "double_stream_modulation_img."
    lora_targets = (*UsualFamily.lora_targets, "to_qkv_mlp_proj")
    prompts_per_call = 16
    edits: Edits = "may"

    def schedule(self, pipe: Any) -> FlowSchedule:
        """Rectified flow on even sigmas, shifted by the numbers of tokens and steps."""
        return FlowSchedule(pipe.scheduler, sigmas=even_sigmas, mu=log_shift)

    def latent_channels(self, pipe: Any) -> int:
        """Those of four cells of the autoencoder."""
        return 4 * pipe.vae.config["latent_channels"]

    def cell(self, pipe: Any) -> int:
        """Two of the autoencoder's."""
        return 2 * int(pipe.vae_scale_factor)

    def native(self, pipe: Any) -> tuple[int, int]:
        """As the pipeline says, in cells of the autoencoder."""
        return pipe.default_sample_size // 2, pipe.default_sample_size // 2

    def context(self, pipe: Any) -> TextContext:
        """Qwen3's tokenizer; some of the tokens are the template's."""
        return TextContext(pipe.tokenizer, TOKENS)

    def embed(self, pipe: Any, prompts: list[str], device: torch.device) -> Embedding:
        """The hidden layers side by side."""
        tokens, _ = pipe.encode_prompt(prompts, device, max_sequence_length=TOKENS)
        return {"tokens": tokens}

    def forward(self, pipe: Any, network: Any, x_t: Latents, timestep: Tensor, embedding: Embedding) -> Latents:
        """One call of the transformer, which is told the time from 0 to 1; what is edited comes after x_t."""
        image, places = x_t.flatten(2).mT, _places(x_t)
        if (original := embedding.get(ORIGINAL)) is not None:
            image = torch.cat([image, original.flatten(2).mT], dim=1)
            places = torch.cat([places, _places(original, which=FIRST_ORIGINAL)])
        tokens = network(
            hidden_states=image,
            timestep=timestep.expand(len(x_t)).to(x_t.dtype) / 1000,
            encoder_hidden_states=embedding["tokens"],
            txt_ids=_grid(1, 1, 1, embedding["tokens"].shape[1], device=x_t.device),
            img_ids=places,
        ).sample
        return tokens[:, : x_t[0, 0].numel()].mT.unflatten(2, x_t.shape[-2:])

    def encode(self, pipe: Any, images: Images) -> tuple[Latents, Latents]:
        """Normalised by the autoencoder's batch norm."""
        mean, std = (pixel_unshuffle(one, 2) for one in autoencoder.encode(pipe.vae, images))
        shift, scale = _moments(pipe.vae)
        return (mean - shift) / scale, std / scale

    def decode(self, pipe: Any, latents: Latents) -> Images:
        """The way back."""
        shift, scale = _moments(pipe.vae)
        return autoencoder.decode(pipe.vae, pixel_shuffle(latents * scale + shift, 2))


def log_shift(num_steps: int, tokens: int) -> float:
    """The logarithm of the shift that was fitted to FLUX.2: linear in the tokens, and between 10 and 200 steps."""
    many, few = 0.00016927 * tokens + 0.45666666, 8.73809524e-05 * tokens + 1.89833333
    return many if tokens > MANY_TOKENS else many + (many - few) / 190 * (num_steps - 200)


def _places(latents: Latents, *, which: int = 0) -> Tensor:
    """(image, row, column, word) of every token of an image, `[n, 4]`."""
    places = _grid(1, *latents.shape[-2:], 1, device=latents.device)
    places[:, 0] = which
    return places


def _grid(*sides: int, device: torch.device) -> Tensor:
    return torch.cartesian_prod(*(torch.arange(side, device=device) for side in sides))


def _moments(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of four cells, `[c, 1, 1]`."""
    mean, variance = (one.float()[:, None, None] for one in (vae.bn.running_mean, vae.bn.running_var))
    return mean, (variance + vae.config["batch_norm_eps"]).sqrt()
