"""Stable Diffusion 1.x and 2.x: a UNet that predicts noise or v, one CLIP text encoder.

InstructPix2Pix is one of these that sees an image, too, and says only that.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rpo.errors import InputError
from rpo.models.base import TextContext
from rpo.models.families.usual import UsualFamily
from rpo.models.schedules import DiscreteSchedule
from rpo.types import Embedding, Latents

OTHER_DENOISERS = {8: "an instruct-pix2pix UNet (an editor)", 9: "an inpainting UNet"}
"""UNets of the same shape but for their input channels, which need more than a prompt."""


class StableDiffusion(UsualFamily):
    """The family of `StableDiffusionPipeline`."""

    name = "Stable Diffusion 1.x/2.x"
    pipelines: tuple[str, ...] = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
    denoiser = "unet"
    parts: Mapping[str, str] = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    # Training judges latents, and a blacked-out image is no sample of the model: the checker stays in the checkpoint.
    load_options: Mapping[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
    lora_dialect = "diffusers"

    images_in = 1
    """Latents that the UNet takes side by side."""

    def refuse(self, pipe: Any) -> None:
        """Refuse inpainting and editing UNets, those of SDXL, and guidance-distilled ones."""
        refuse_other_unets(pipe, addition_embed_type=None, images_in=self.images_in)

    def schedule(self, pipe: Any) -> DiscreteSchedule:
        """The betas of the pipeline's scheduler."""
        return DiscreteSchedule(pipe.scheduler)

    def context(self, pipe: Any) -> TextContext:
        """CLIP's tokenizer, usually 77 tokens."""
        return TextContext(pipe.tokenizer, pipe.tokenizer.model_max_length)

    def embed(self, pipe: Any, prompts: list[str], device: torch.device) -> Embedding:
        """CLIP's hidden states of every token."""
        return {"tokens": pipe.encode_prompt(prompts, device, 1, False)[0]}

    def forward(self, pipe: Any, network: Any, x_t: Latents, timestep: Tensor, embedding: Embedding) -> Latents:
        """One call of the UNet."""
        return network(x_t, timestep, encoder_hidden_states=embedding["tokens"]).sample


def refuse_other_unets(pipe: Any, *, addition_embed_type: str | None, images_in: int = 1) -> None:
    """Refuse a UNet that needs more than its latents, a timestep and the family's own embeddings."""
    config, expected = pipe.unet.config, images_in * pipe.vae.config["latent_channels"]
    if config["in_channels"] != expected:
        kind = OTHER_DENOISERS.get(config["in_channels"], "another kind of UNet")
        raise InputError(
            f"the UNet takes {config['in_channels']} channels: {kind}, but that of a {type(pipe).__name__} takes "
            f"{expected}; load the checkpoint with the pipeline class of its model_index.json, or use the "
            "text-to-image checkpoint that it was made from"
        )
    if config["addition_embed_type"] != addition_embed_type:
        raise InputError(
            f"the UNet has addition_embed_type={config['addition_embed_type']!r}, but that of a "
            f"{type(pipe).__name__} has {addition_embed_type!r} (SDXL has 'text_time'); load the checkpoint with the "
            "pipeline class of its model_index.json"
        )
    if config["time_cond_proj_dim"] is not None:
        raise InputError(
            f"the UNet has time_cond_proj_dim={config['time_cond_proj_dim']!r}: a guidance-distilled UNet (LCM), which "
            "is not supported yet; train the base that it was distilled from"
        )
