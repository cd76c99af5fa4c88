"""Sana: a transformer that predicts flow, one text encoder (Gemma 2), and the deep-compression autoencoder.

Its latents are 32 pixels a cell and have no spread: an image has one latent. A prompt is preceded by the instruction
that is the default of the pipeline's call, no prompt is not. The checkpoints' scheduler is DPM-Solver++ on the sigmas
of a flow, which tells the network whole timesteps.
"""

from collections.abc import Mapping
from inspect import signature
from typing import Any, final

import torch
from torch import Tensor

from rpo.models.base import TextContext
from rpo.models.families.usual import UsualFamily, where_given
from rpo.models.schedules import FlowSchedule
from rpo.types import Embedding, Images, Latents

TOKENS = 300
"""As in the pipeline's own call: the first, the last of the instruction, and 298 of the prompt."""


@final
class Sana(UsualFamily):
    """The family of `SanaPipeline`."""

    name = "Sana"
    pipelines: tuple[str, ...] = ("SanaPipeline", "SanaPAGPipeline")
    parts: Mapping[str, str] = {"transformer": "SanaTransformer2DModel", "vae": "AutoencoderDC"}
    prompts_per_call = 16

    def schedule(self, pipe: Any) -> FlowSchedule:
        """Rectified flow with the scheduler's shift."""
        return FlowSchedule(pipe.scheduler)

    def context(self, pipe: Any) -> TextContext:
        """Gemma's tokenizer."""
        return TextContext(pipe.tokenizer, TOKENS - 1)

    def embed(self, pipe: Any, prompts: list[str], device: torch.device) -> Embedding:
        """Gemma's hidden states, and which of them are a prompt's."""
        has_none = "" in prompts
        tokens, mask, *negative = pipe.encode_prompt(
            prompts,
            has_none,
            device=device,
            max_sequence_length=TOKENS,
            complex_human_instruction=signature(type(pipe).__call__).parameters["complex_human_instruction"].default,
        )
        embedding = {"tokens": tokens, "mask": mask}
        return where_given(prompts, embedding, dict(zip(embedding, negative, strict=True))) if has_none else embedding

    def forward(self, pipe: Any, network: Any, x_t: Latents, timestep: Tensor, embedding: Embedding) -> Latents:
        """One call of the transformer."""
        return network(
            x_t,
            encoder_hidden_states=embedding["tokens"],
            encoder_attention_mask=embedding["mask"],
            timestep=timestep.expand(len(x_t)) * network.config["timestep_scale"],
        ).sample

    def encode(self, pipe: Any, images: Images) -> tuple[Latents, Latents]:
        """The one latent of each image, whose standard deviation is 0."""
        latents = pipe.vae.encode((2 * images - 1).to(pipe.vae.dtype)).latent.float()
        return latents * pipe.vae.config["scaling_factor"], torch.zeros_like(latents)
