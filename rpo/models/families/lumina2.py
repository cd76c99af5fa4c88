"""Lumina-Image 2.0: a transformer that predicts flow, one text encoder (Gemma 2), and FLUX.1's autoencoder.

Its network runs the other way: it is told 0 at the noise end and 1 at the data end, and puts out x_0 - eps. A prompt is
preceded by the pipeline's instruction, no prompt is not. Guidance is normalised, row by row of the latents.
"""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from rpo.models.base import TextContext, guided
from rpo.models.families.usual import UsualFamily, where_given
from rpo.models.schedules import FlowSchedule, even_sigmas, linear_mu
from rpo.types import Embedding, Latents

TOKENS = 256
"""As in the pipeline's own call, those of the instruction included."""


@final
class Lumina2(UsualFamily):
    """The family of `Lumina2Pipeline`."""

    name = "Lumina-Image 2.0"
    pipelines: tuple[str, ...] = ("Lumina2Pipeline", "Lumina2Text2ImgPipeline")
    parts: Mapping[str, str] = {"transformer": "Lumina2Transformer2DModel", "vae": "AutoencoderKL"}
    prompts_per_call = 16

    def schedule(self, pipe: Any) -> FlowSchedule:
        """Rectified flow with the scheduler's shift; a dynamic one goes by the latents' channels, of all things."""
        mu = linear_mu(pipe.scheduler.config, self.latent_channels(pipe), max_shift=1.15)
        return FlowSchedule(pipe.scheduler, sigmas=even_sigmas, mu=lambda num_steps, sequence_length: mu)

    def context(self, pipe: Any) -> TextContext:
        """Gemma's tokenizer, and what the instruction leaves of its tokens."""
        instruction = pipe.tokenizer(f"{pipe.system_prompt} <Prompt Start> ", add_special_tokens=False)
        return TextContext(pipe.tokenizer, TOKENS - len(instruction.input_ids))

    def embed(self, pipe: Any, prompts: list[str], device: torch.device) -> Embedding:
        """Gemma's hidden states before the last layer, and which of them are a prompt's."""
        has_none = "" in prompts
        tokens, mask, *negative = pipe.encode_prompt(prompts, has_none, device=device, max_sequence_length=TOKENS)
        embedding = {"tokens": tokens, "mask": mask}
        return where_given(prompts, embedding, dict(zip(embedding, negative, strict=True))) if has_none else embedding

    def forward(self, pipe: Any, network: Any, x_t: Latents, timestep: Tensor, embedding: Embedding) -> Latents:
        """One call of the transformer, which waits for the device: it makes lists of the captions' lengths."""
        time = (1 - timestep / pipe.scheduler.config["num_train_timesteps"]).expand(len(x_t))
        return -network(x_t, time, embedding["tokens"], embedding["mask"].bool()).sample

    def guided(self, negative_pred: Latents, prompt_pred: Latents, guidance_scale: float) -> Latents:
        """Classifier-free guidance whose rows are as long as the prompt's own prediction."""
        pred = guided(negative_pred, prompt_pred, guidance_scale)
        return pred * (prompt_pred.norm(dim=-1, keepdim=True) / pred.norm(dim=-1, keepdim=True))
