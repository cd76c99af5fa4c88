"""Krea 2: a transformer that predicts flow on one stream, twelve hidden layers of Qwen3-VL as its text, one frame.

The network makes one layer of the twelve itself, so that a prompt is larger than in any other family. It is put into
Qwen-Image's template, whose beginning is cut off; padding lies before the template's end, and a mask says so.
The scale of the pipeline's guidance is 0 where there is none.
"""

from collections.abc import Mapping
from inspect import signature
from typing import Any, final

import torch
from torch import Tensor

from rpo.models.base import TextContext
from rpo.models.families.one_frame import OneFrameFamily
from rpo.models.families.packed import no_positions, pack, positions, unpack
from rpo.models.schedules import FlowSchedule, even_sigmas
from rpo.types import Embedding, Latents

TOKENS = 512
"""As in the pipeline's own call."""

DISTILLED_MU = 1.15
"""The logarithm of a distilled checkpoint's shift, for every size."""


@final
class Krea2(OneFrameFamily):
    """The family of `Krea2Pipeline`."""

    name = "Krea 2"
    pipelines: tuple[str, ...] = ("Krea2Pipeline",)
    parts: Mapping[str, str] = {"transformer": "Krea2Transformer2DModel", "vae": "AutoencoderKLQwenImage"}
    single_file_key = "txtfusion."
    lora_targets = (*OneFrameFamily.lora_targets, "to_gate")
    guidance_offset = 1.0
    prompts_per_call = 16

    def schedule(self, pipe: Any) -> FlowSchedule:
        """Rectified flow on even sigmas, with the scheduler's shift; of a distilled checkpoint with one of its own."""
        is_distilled = pipe.config.get("is_distilled")
        mu = (lambda num_steps, tokens: DISTILLED_MU) if is_distilled else None
        return FlowSchedule(pipe.scheduler, sigmas=even_sigmas, max_shift=1.15, mu=mu)

    def native(self, pipe: Any) -> tuple[int, int]:
        """As the pipeline's own call says, in pixels."""
        words = signature(type(pipe).__call__).parameters
        return words["height"].default // pipe.vae_scale_factor, words["width"].default // pipe.vae_scale_factor

    def context(self, pipe: Any) -> TextContext:
        """Qwen3-VL's tokenizer; the last tokens are the template's."""
        return TextContext(pipe.tokenizer, TOKENS - pipe.prompt_template_encode_num_suffix_tokens)

    def embed(self, pipe: Any, prompts: list[str], device: torch.device) -> Embedding:
        """The hidden layers of every token side by side, and which tokens count."""
        tokens, mask = pipe.encode_prompt(prompts, device, max_sequence_length=TOKENS)
        return {"tokens": tokens.flatten(2), "mask": mask}

    def forward(self, pipe: Any, network: Any, x_t: Latents, timestep: Tensor, embedding: Embedding) -> Latents:
        """One call of the transformer, which is told the time from 0 to 1."""
        tokens = network(
            hidden_states=pack(x_t),
            timestep=timestep.expand(len(x_t)).to(x_t.dtype) / 1000,
            encoder_hidden_states=embedding["tokens"].unflatten(2, (self._config(pipe)["num_text_layers"], -1)),
            encoder_attention_mask=embedding["mask"].bool(),
            position_ids=torch.cat([no_positions(embedding["tokens"]), positions(x_t)]),
        ).sample
        return unpack(tokens, x_t)
