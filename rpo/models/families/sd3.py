"""Stable Diffusion 3 and 3.5: a transformer that predicts flow, two CLIP text encoders and T5, which may be absent.

The pipeline's scheduler shifts its times towards the noise (by 3, or by a measure of the image's size). The two CLIP
encoders read 77 tokens of a prompt and T5 reads 256; without T5, zeros stand in its place and what is behind the 77th
token would have no effect at all, so that such a prompt is refused.
"""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from rpo.models.base import TextContext
from rpo.models.families.usual import UsualFamily
from rpo.models.schedules import FlowSchedule
from rpo.types import Embedding, Latents

T5_TOKENS = 256
"""As in the pipeline's own call."""


@final
class StableDiffusion3(UsualFamily):
    """The family of `StableDiffusion3Pipeline`."""

    name = "Stable Diffusion 3"
    pipelines: tuple[str, ...] = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline")
    parts: Mapping[str, str] = {"transformer": "SD3Transformer2DModel", "vae": "AutoencoderKL"}
    text_encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2", "text_encoder_3")
    single_file_key = "joint_blocks.0."
    lora_targets = (*UsualFamily.lora_targets, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

    def schedule(self, pipe: Any) -> FlowSchedule:
        """Rectified flow with the scheduler's shift."""
        return FlowSchedule(pipe.scheduler)

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
