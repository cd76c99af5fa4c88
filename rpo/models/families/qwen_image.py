"""Qwen-Image: a transformer that predicts flow, Qwen2.5-VL as its text encoder, and an autoencoder of videos.

A prompt is put into a template, whose beginning is cut off again from what the encoder makes of it. Prompts are of any
length: here they are filled up to one, and a mask says which tokens count. Guidance is given the length of the prompt's
own prediction back, token by token.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rpo.models.base import ORIGINAL, TextContext, guided
from rpo.models.families.one_frame import OneFrameFamily
from rpo.models.families.packed import pack, unpack
from rpo.types import Embedding, Latents

TOKENS = 512
"""As in the pipeline's own call."""


class QwenImage(OneFrameFamily):
    """The family of `QwenImagePipeline`."""

    name = "Qwen-Image"
    pipelines: tuple[str, ...] = ("QwenImagePipeline", "QwenImageImg2ImgPipeline")
    parts: Mapping[str, str] = {"transformer": "QwenImageTransformer2DModel", "vae": "AutoencoderKLQwenImage"}
    single_file_key = ".img_mod.1."
    guidance_argument = "true_cfg_scale"
    prompts_per_call = 16

    def context(self, pipe: Any) -> TextContext:
        """Qwen2.5-VL's tokenizer; the template's end comes after the prompt."""
        return TextContext(pipe.tokenizer, TOKENS)

    def embed(self, pipe: Any, prompts: list[str], device: torch.device) -> Embedding:
        """Qwen2.5-VL's last hidden states, zero where a prompt has ended, and where it has not."""
        tokens, mask = pipe.encode_prompt(prompts, device, max_sequence_length=TOKENS)
        return filled(tokens, mask, TOKENS)

    def forward(self, pipe: Any, network: Any, x_t: Latents, timestep: Tensor, embedding: Embedding) -> Latents:
        """One call of the transformer, which is told the time from 0 to 1."""
        images = [x_t, *(one for name, one in embedding.items() if name == ORIGINAL)]
        tokens = network(
            hidden_states=torch.cat([pack(one) for one in images], dim=1),
            timestep=timestep.expand(len(x_t)).to(x_t.dtype) / 1000,
            encoder_hidden_states=embedding["tokens"],
            encoder_hidden_states_mask=embedding["mask"],
            img_shapes=[[(1, one.shape[-2] // 2, one.shape[-1] // 2) for one in images]] * len(x_t),
        ).sample
        return unpack(tokens, x_t)

    def guided(self, negative_pred: Latents, prompt_pred: Latents, guidance_scale: float) -> Latents:
        """Classifier-free guidance of the prompt's length: each token has the norm that it has without.

        Sums of another memory layout round in another way, and a replay would not be what was drawn.
        """
        negative_pred, prompt_pred = negative_pred.contiguous(), prompt_pred.contiguous()
        tokens, prompt = pack(guided(negative_pred, prompt_pred, guidance_scale)), pack(prompt_pred)
        norms = prompt.norm(dim=-1, keepdim=True) / tokens.norm(dim=-1, keepdim=True)
        return unpack(tokens * norms, prompt_pred)


def filled(tokens: Tensor, mask: Tensor | None, length: int) -> Embedding:
    """Tokens filled up with zeros to one length, and which of them count."""
    mask = tokens.new_ones(tokens.shape[:2]) if mask is None else mask
    missing = length - tokens.shape[1]
    return {"tokens": pad(tokens, (0, 0, 0, missing)), "mask": pad(mask, (0, missing)).bool()}
