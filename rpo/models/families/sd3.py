"""Stable Diffusion 3 and 3.5: a transformer that predicts flow, two CLIP text encoders and T5, which may be absent.

The pipeline's scheduler shifts its times towards the noise (by 3, or by a measure of the image's size). The two CLIP
encoders read 77 tokens of a prompt and T5 reads 256; without T5, zeros stand in its place and what is behind the 77th
token would have no effect at all, so that such a prompt is refused.
"""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from rpo.errors import InputError
from rpo.models.base import TextContext
from rpo.models.schedules import FlowSchedule
from rpo.types import Embedding, Latents

T5_TOKENS = 256
"""As in the pipeline's own call."""


@final
class StableDiffusion3:
    """The family of `StableDiffusion3Pipeline`."""

    name = "Stable Diffusion 3"
    pipelines: tuple[str, ...] = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline")
    denoiser = "transformer"
    parts: Mapping[str, str] = {"transformer": "SD3Transformer2DModel", "vae": "AutoencoderKL"}
    text_encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2", "text_encoder_3")
    load_options: Mapping[str, Any] = {}
    single_file_key = "joint_blocks.0."
    lora_targets: tuple[str, ...] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
    )
    lora_dialect = "peft"
    widens_autoencoder = False

    def refuse(self, pipe: Any) -> None:
        """Refuse a transformer that takes more than noisy latents."""
        taken, latent_channels = pipe.transformer.config["in_channels"], pipe.vae.config["latent_channels"]
        if taken != latent_channels:
            raise InputError(
                f"the transformer takes {taken} channels, but a text-to-image one takes the {latent_channels} of its "
                "autoencoder's latents; use the text-to-image checkpoint that it was made from"
            )

    def schedule(self, pipe: Any) -> FlowSchedule:
        """Rectified flow with the scheduler's shift."""
        return FlowSchedule(pipe.scheduler)

    def sequence_length(self, pipe: Any, latent_shape: tuple[int, int, int]) -> int:
        """The patches of the latents."""
        side = pipe.transformer.config["patch_size"]
        return (latent_shape[1] // side) * (latent_shape[2] // side)

    def context(self, pipe: Any) -> TextContext:
        """T5's tokenizer, or without T5 CLIP's."""
        if pipe.text_encoder_3 is None:
            return TextContext(pipe.tokenizer, pipe.tokenizer_max_length, refuses_longer=True)
        return TextContext(pipe.tokenizer_3, T5_TOKENS)

    def embed(self, pipe: Any, prompts: list[str], device: torch.device) -> Embedding:
        """CLIP's hidden states, then T5's, and CLIP's pooled ones."""
        tokens, _, pooled, _ = pipe.encode_prompt(
            prompts, None, None, device=device, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS
        )
        return {"tokens": tokens, "pooled": pooled}

    def forward(self, pipe: Any, network: Any, x_t: Latents, timestep: Tensor, embedding: Embedding) -> Latents:
        """One call of the transformer, whose positions are cut from the middle of its table."""
        return network(
            hidden_states=x_t,
            timestep=timestep.expand(len(x_t)),
            encoder_hidden_states=embedding["tokens"],
            pooled_projections=embedding["pooled"],
        ).sample
