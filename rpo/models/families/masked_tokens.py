"""aMUSEd (arXiv:2401.01808), a masked-token generator: a UViT over the codes of a VQ autoencoder, one CLIP encoder.

What is noised are tokens, by masks; see `rpo.process.categorical`. The network is told no time: it sees how much is
masked. Its text encoder gives the last hidden state but one, and the projected pooled state; besides it is told the
size of the image, its crop, and an aesthetic score, for which the pipeline's own call has values.
"""

from collections.abc import Mapping
from inspect import signature
from typing import Any, final

import torch
from diffusers.loaders import SanaLoraLoaderMixin
from torch import Tensor

from rpo.errors import InputError
from rpo.models.base import TextContext
from rpo.models.families.usual import UsualFamily
from rpo.models.schedules import MaskingSchedule
from rpo.process.categorical import CHANNELS, TOKENS
from rpo.types import Embedding, Images, Latents, Output


@final
class MaskedTokens(UsualFamily):
    """The family of `AmusedPipeline`."""

    name = "aMUSEd (masked tokens)"
    pipelines: tuple[str, ...] = ("AmusedPipeline", "AmusedImg2ImgPipeline")
    autoencoder = "vqvae"
    parts: Mapping[str, str] = {"transformer": "UVit2DModel", "vqvae": "VQModel"}
    widens_autoencoder = True
    narrows_states = False
    lora_preparation: tuple[str, ...] = (
        "from diffusers.loaders import SanaLoraLoaderMixin  # aMUSEd's own looks for a UNet",
        "pipe.__class__ = type(type(pipe).__name__, (type(pipe), SanaLoraLoaderMixin), {})",
    )

    def enable_lora(self, pipe: Any) -> None:
        """The same; what is saved of it still names the class of diffusers."""
        made = type(pipe)
        if not issubclass(made, SanaLoraLoaderMixin):
            pipe.__class__ = type(made.__name__, (made, SanaLoraLoaderMixin), {"__module__": made.__module__})

    def refuse(self, pipe: Any) -> None:
        """Refuse a network and an autoencoder of other codebooks."""
        known, codes = self._config(pipe)["codebook_size"], pipe.vqvae.config["num_vq_embeddings"]
        mask, words = pipe.scheduler.config.get("mask_token_id"), self._config(pipe)["vocab_size"]
        if known != codes or not pipe.vqvae.config["lookup_from_codebook"]:
            raise InputError(
                f"the transformer knows {known} tokens, but the autoencoder has {codes}, looked up by number: "
                f"{pipe.vqvae.config['lookup_from_codebook']}; expected one codebook: load the checkpoint's own parts"
            )
        if mask is not None and not known <= mask < words:
            raise InputError(
                f"the scheduler's mask_token_id is {mask}, but the transformer's are {known} to {words - 1}; load the "
                "checkpoint's own scheduler"
            )

    def schedule(self, pipe: Any) -> MaskingSchedule:
        """The shares of the pipeline's scheduler."""
        return MaskingSchedule(pipe.scheduler)

    def latent_channels(self, pipe: Any) -> int:
        """Those of a state of tokens."""
        return CHANNELS

    def patch(self, pipe: Any) -> int:
        """Two where the network looks at a quarter of the places."""
        return 2 if self._config(pipe)["downsample"] else 1

    def context(self, pipe: Any) -> TextContext:
        """CLIP's tokenizer, usually 77 tokens."""
        return TextContext(pipe.tokenizer, pipe.tokenizer.model_max_length)

    def embed(self, pipe: Any, prompts: list[str], device: torch.device) -> Embedding:
        """CLIP's hidden states but the last, and its projection."""
        words = {"padding": "max_length", "truncation": True, "max_length": pipe.tokenizer.model_max_length}
        read = pipe.tokenizer(prompts, return_tensors="pt", **words).input_ids.to(device)
        told = pipe.text_encoder(read, return_dict=True, output_hidden_states=True)
        return {"tokens": told.hidden_states[-2], "pooled": told.text_embeds}

    def forward(self, pipe: Any, network: Any, x_t: Latents, timestep: Tensor, embedding: Embedding) -> Output:
        """Logits of every place."""
        tokens = x_t[:, TOKENS].round().long()
        mask, codes = pipe.scheduler.config["mask_token_id"], network.config["codebook_size"]
        told = signature(type(pipe).__call__).parameters
        (top, left), score = (told[f"micro_conditioning_{name}"].default for name in ("crop_coord", "aesthetic_score"))
        height, width = (side * self.cell(pipe) for side in tokens.shape[1:])
        micro = embedding["tokens"].new_empty(len(tokens), 5)  # filled on the device: nothing comes from the host
        for place, one in enumerate((width, height, top, left, score)):
            micro[:, place] = one
        return network(
            torch.where(tokens < 0, mask, tokens.clamp(max=codes - 1)),
            encoder_hidden_states=embedding["tokens"],
            pooled_text_emb=embedding["pooled"],
            micro_conds=micro,
        )

    def encode(self, pipe: Any, images: Images) -> tuple[Latents, Latents]:
        """The nearest code of every place; images are taken in [0, 1], as they are."""
        z = pipe.vqvae.encode(images.to(pipe.vqvae.dtype)).latents
        codes = pipe.vqvae.quantize(z)[2][2].view(len(images), *z.shape[2:]).float()
        state = torch.stack([codes, codes, torch.zeros_like(codes)], dim=1)
        return state, torch.zeros_like(state)

    def decode(self, pipe: Any, latents: Latents) -> Images:
        """By looking the codes up."""
        vqvae = pipe.vqvae
        tokens = latents[:, TOKENS].round().long().clamp(0, vqvae.config["num_vq_embeddings"] - 1)
        shape = (*tokens.shape, vqvae.config["latent_channels"])
        return vqvae.decode(tokens, force_not_quantize=True, shape=shape).sample.float()
