"""Chroma: FLUX.1's transformer without a guidance scale and without CLIP, so that it is guided by a second call.

A mask travels with T5's 512 tokens: 1 on those of the prompt and on one of padding after them, else 0. The network adds
it to the logits of attention as it is: padding is attended to less, not never.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rpo.models.base import TextContext
from rpo.models.families.packed import TWO_STREAM_LAYERS, PackedFamily, no_positions, pack, positions, unpack
from rpo.types import Embedding, Latents

T5_TOKENS = 512
"""As in the pipeline's own call."""


@final
class Chroma(PackedFamily):
    """The family of `ChromaPipeline`."""

    name = "Chroma"
    pipelines: tuple[str, ...] = ("ChromaPipeline", "ChromaImg2ImgPipeline")
    parts: Mapping[str, str] = {"transformer": "ChromaTransformer2DModel", "vae": "AutoencoderKL"}
    single_file_key = "distilled_guidance_layer."
    lora_targets = TWO_STREAM_LAYERS

    def context(self, pipe: Any) -> TextContext:
        """T5's tokenizer."""
        return TextContext(pipe.tokenizer, T5_TOKENS)

    def embed(self, pipe: Any, prompts: list[str], device: torch.device) -> Embedding:
        """T5's hidden states and which of them count."""
        tokens, _, mask, *_ = pipe.encode_prompt(
            prompts, device=device, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS
        )
        return {"tokens": tokens, "mask": mask}

    def forward(self, pipe: Any, network: Any, x_t: Latents, timestep: Tensor, embedding: Embedding) -> Latents:
        """One call of the transformer, which is told the time from 0 to 1."""
        packed = pack(x_t)
        mask = torch.cat([embedding["mask"], packed.new_ones(packed.shape[:2])], dim=1)
        if network.gradient_checkpointing:
            network.enable_gradient_checkpointing(partial(_checkpointed, mask))
        tokens = network(
            hidden_states=packed,
            timestep=timestep.expand(len(x_t)).to(x_t.dtype) / 1000,
            encoder_hidden_states=embedding["tokens"],
            attention_mask=mask,
            txt_ids=no_positions(embedding["tokens"]),
            img_ids=positions(x_t),
        ).sample
        return unpack(tokens, x_t)


def _checkpointed(mask: Tensor, block: nn.Module, *given: Any) -> Any:
    """A block that is computed again for its gradient; the network leaves out the mask of those with one stream."""
    is_masked = any(one is mask for one in given)
    return checkpoint(block, *given, *(() if is_masked else (mask,)), use_reentrant=False)
