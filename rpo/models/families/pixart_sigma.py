"""PixArt-Sigma: a transformer that predicts noise and its variance, one text encoder (T5), and the SDXL autoencoder.

The variance is the second half of the network's channels, which samplers leave aside. Captions are cleaned as in the
pipeline's own call. Neither the pipeline's class nor the transformer's loads a LoRA; both can be given what other
classes inherit.
"""

from collections.abc import Mapping
from typing import Any, final

import torch
from diffusers.loaders import PeftAdapterMixin, SanaLoraLoaderMixin
from torch import Tensor

from rpo.models.base import TextContext
from rpo.models.families.usual import UsualFamily
from rpo.models.schedules import DiscreteSchedule
from rpo.types import Embedding, Latents

TOKENS = 300
"""As in the pipeline's own call."""


@final
class PixArtSigma(UsualFamily):
    """The family of `PixArtSigmaPipeline`."""

    name = "PixArt-Sigma"
    pipelines: tuple[str, ...] = ("PixArtSigmaPipeline", "PixArtSigmaPAGPipeline")
    parts: Mapping[str, str] = {"transformer": "PixArtTransformer2DModel", "vae": "AutoencoderKL"}
    lora_preparation: tuple[str, ...] = (
        "from diffusers.loaders import PeftAdapterMixin, SanaLoraLoaderMixin  # which PixArt's classes lack",
        "for part, loader in ((pipe, SanaLoraLoaderMixin), (pipe.transformer, PeftAdapterMixin)):",
        "    part.__class__ = type(type(part).__name__, (type(part), loader), {})",
    )

    def enable_lora(self, pipe: Any) -> None:
        """The same; what is saved of them still names the classes of diffusers."""
        for part, loader in ((pipe, SanaLoraLoaderMixin), (pipe.transformer, PeftAdapterMixin)):
            made = type(part)
            if not issubclass(made, loader):
                part.__class__ = type(made.__name__, (made, loader), {"__module__": made.__module__})

    def schedule(self, pipe: Any) -> DiscreteSchedule:
        """The betas of the pipeline's scheduler."""
        return DiscreteSchedule(pipe.scheduler)

    def context(self, pipe: Any) -> TextContext:
        """T5's tokenizer."""
        return TextContext(pipe.tokenizer, TOKENS)

    def embed(self, pipe: Any, prompts: list[str], device: torch.device) -> Embedding:
        """T5's hidden states, and which of them are a prompt's."""
        tokens, mask, *_ = pipe.encode_prompt(
            prompts, False, device=device, clean_caption=True, max_sequence_length=TOKENS
        )
        return {"tokens": tokens, "mask": mask}

    def forward(self, pipe: Any, network: Any, x_t: Latents, timestep: Tensor, embedding: Embedding) -> Latents:
        """One call of the transformer: the noise alone."""
        pred = network(
            x_t,
            encoder_hidden_states=embedding["tokens"],
            encoder_attention_mask=embedding["mask"],
            timestep=timestep.expand(len(x_t)),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        return pred[:, : x_t.shape[1]]
