"""InstructPix2Pix (Brooks et al., arXiv:2211.09800): Stable Diffusion's UNet, which sees the image to edit beside x_t.

It is shown the autoencoder's own latents, not scaled. The pipeline guides by instruction and image apart; rpo guides by
the instruction alone, which is what the pipeline does with `image_guidance_scale=1`.
"""

from typing import Any, final

import torch
from torch import Tensor

from rpo.models.base import ORIGINAL, Edits
from rpo.models.families.stable_diffusion import StableDiffusion
from rpo.types import Embedding, Latents


@final
class InstructPix2Pix(StableDiffusion):
    """The family of `StableDiffusionInstructPix2PixPipeline`."""

    name = "InstructPix2Pix"
    pipelines: tuple[str, ...] = ("StableDiffusionInstructPix2PixPipeline",)
    edits: Edits = "always"
    images_in = 2

    def embed(self, pipe: Any, prompts: list[str], device: torch.device) -> Embedding:
        """CLIP's hidden states of every token."""
        return {"tokens": pipe._encode_prompt(prompts, device, 1, False)}

    def shown(self, pipe: Any, latents: Latents) -> Latents:
        """The latents as the autoencoder has them."""
        return latents / pipe.vae.config["scaling_factor"]

    def forward(self, pipe: Any, network: Any, x_t: Latents, timestep: Tensor, embedding: Embedding) -> Latents:
        """One call of the UNet."""
        both = torch.cat([x_t, embedding[ORIGINAL]], dim=1)
        return network(both, timestep, encoder_hidden_states=embedding["tokens"]).sample
