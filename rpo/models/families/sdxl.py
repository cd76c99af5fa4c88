"""SDXL and its fine-tunes: a UNet that predicts noise or v, two CLIP text encoders, and three sizes beside the prompt.

The UNet is told how large the original image was, where it was cropped, and how large the image is to be. Of a training
image that is what was done to it ("sizes", as in the training of SDXL); of one that is drawn it is what the pipeline
tells when people draw: the image's own size, twice, and no crop.

The autoencoder of the first release overflows in float16; its configuration says so (`force_upcast`), and it then
computes in float32, as in the pipeline.
"""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from rpo.models.base import TextContext
from rpo.models.families.stable_diffusion import refuse_other_unets
from rpo.models.families.usual import UsualFamily
from rpo.models.schedules import DiscreteSchedule
from rpo.types import Embedding, Latents


@final
class StableDiffusionXL(UsualFamily):
    """The family of `StableDiffusionXLPipeline`."""

    name = "Stable Diffusion XL"
    pipelines: tuple[str, ...] = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
    denoiser = "unet"
    parts: Mapping[str, str] = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    text_encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    load_options: Mapping[str, Any] = {"add_watermarker": False}
    single_file_key = "conditioner.embedders.1."
    lora_dialect = "diffusers"
    widens_autoencoder = True

    def refuse(self, pipe: Any) -> None:
        """Refuse inpainting and editing UNets, those of SD 1.x/2.x, and guidance-distilled ones."""
        refuse_other_unets(pipe, addition_embed_type="text_time")

    def schedule(self, pipe: Any) -> DiscreteSchedule:
        """The betas of the pipeline's scheduler."""
        return DiscreteSchedule(pipe.scheduler)

    def context(self, pipe: Any) -> TextContext:
        """The tokenizer that both text encoders share, 77 tokens."""
        return TextContext(pipe.tokenizer_2, pipe.tokenizer_2.model_max_length)

    def embed(self, pipe: Any, prompts: list[str], device: torch.device) -> Embedding:
        """Both encoders' hidden states side by side, and the pooled ones of the second.

        No prompt is zeros where the pipeline says so (`force_zeros_for_empty_prompt`): what guidance pushes away from
        when people draw, and what a dropped caption was in training.
        """
        tokens, _, pooled, _ = pipe.encode_prompt(
            prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if pipe.config["force_zeros_for_empty_prompt"]:
            is_given = torch.tensor([prompt != "" for prompt in prompts], device=tokens.device).to(tokens.dtype)
            tokens, pooled = tokens * is_given[:, None, None], pooled * is_given[:, None]
        return {"tokens": tokens, "pooled": pooled}

    def forward(self, pipe: Any, network: Any, x_t: Latents, timestep: Tensor, embedding: Embedding) -> Latents:
        """One call of the UNet."""
        tokens, pooled = embedding["tokens"], embedding["pooled"]
        sizes = embedding.get("sizes")
        if sizes is None:
            height, width = (side * pipe.vae_scale_factor for side in x_t.shape[-2:])
            sizes = tokens.new_zeros(1, 6)  # filled on the device: nothing comes from the host in a step
            sizes[:, ::4], sizes[:, 1::4] = height, width
        added = {"text_embeds": pooled, "time_ids": sizes.to(tokens.dtype).expand(len(x_t), -1)}
        return network(x_t, timestep, encoder_hidden_states=tokens, added_cond_kwargs=added).sample
