"""FLUX.1 [dev]: a transformer that predicts flow and is told how strongly it is guided; one CLIP text encoder and T5.

Guidance was distilled into the network, so that one call does what takes others two, and nothing is pushed away from.
CLIP gives only a summary of its 77 tokens; T5 reads 512. FLUX.1 [schnell], of the same classes, is told no scale.
FLUX.1 Kontext is this one with the image to edit among its tokens.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rpo.errors import InputError
from rpo.models.base import ORIGINAL, Guidance, TextContext
from rpo.models.families.packed import TWO_STREAM_LAYERS, PackedFamily, no_positions, unpack, with_original
from rpo.types import Embedding, Latents

T5_TOKENS = 512
"""As in the pipeline's own call."""


class Flux1(PackedFamily):
    """The family of `FluxPipeline`."""

    name = "FLUX.1 [dev]"
    pipelines: tuple[str, ...] = ("FluxPipeline", "FluxImg2ImgPipeline")
    parts: Mapping[str, str] = {"transformer": "FluxTransformer2DModel", "vae": "AutoencoderKL"}
    text_encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    single_file_key = "guidance_in.in_layer."
    lora_targets = TWO_STREAM_LAYERS
    guidance: Guidance = "embedded"

    def refuse(self, pipe: Any) -> None:
        """Refuse a network that takes more than noisy latents, or is told no guidance scale."""
        super().refuse(pipe)
        if not pipe.transformer.config["guidance_embeds"]:
            raise InputError(
                "the transformer has guidance_embeds=False: one distilled to a few steps (FLUX.1 [schnell]), which is "
                "not supported yet, but that of FLUX.1 [dev] is told a guidance scale; use FLUX.1 [dev]"
            )

    def context(self, pipe: Any) -> TextContext:
        """T5's tokenizer."""
        return TextContext(pipe.tokenizer_2, T5_TOKENS)

    def embed(self, pipe: Any, prompts: list[str], device: torch.device) -> Embedding:
        """T5's hidden states and CLIP's pooled ones."""
        tokens, pooled, _ = pipe.encode_prompt(prompts, device=device, max_sequence_length=T5_TOKENS)
        return {"tokens": tokens, "pooled": pooled}

    def forward(self, pipe: Any, network: Any, x_t: Latents, timestep: Tensor, embedding: Embedding) -> Latents:
        """One call of the transformer, which is told the time from 0 to 1."""
        image, places = with_original(x_t, embedding.get(ORIGINAL))
        tokens = network(
            hidden_states=image,
            timestep=timestep.expand(len(x_t)).to(x_t.dtype) / 1000,
            guidance=embedding["guidance"],
            encoder_hidden_states=embedding["tokens"],
            pooled_projections=embedding["pooled"],
            txt_ids=no_positions(embedding["tokens"]),
            img_ids=places,
        ).sample
        return unpack(tokens, x_t)
