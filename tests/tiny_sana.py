"""A tiny Sana pipeline of the real classes; its autoencoder shrinks images 8-fold, not 32-fold."""

from inspect import signature
from typing import Any

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

from tests.tiny_lumina2 import tiny_gemma, tiny_gemma_tokenizer


def tiny_sana(*, scheduler: Any = None, seed: int = 0) -> SanaPipeline:
    """A whole Sana pipeline: a transformer of linear attention, one text encoder, by default a solver as scheduler."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=4,
            cross_attention_head_dim=8,
            cross_attention_dim=32,
            caption_channels=32,
            sample_size=8,
        )
        for weights in transformer.time_embed.parameters():  # as they are made, it jumps about in time
            weights.data.mul_(0.3)
        levels = {"block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",), "block_out_channels": (8, 8, 8, 8)}
        levels |= {"layers_per_block": (1, 1, 1, 1), "qkv_multiscales": ((), (), (), (5,))}
        vae = AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            scaling_factor=0.41407,
            **{f"{part}_{name}": one for part in ("encoder", "decoder") for name, one in levels.items()},
        )
        text_encoder = tiny_gemma()
    tokenizer = tiny_gemma_tokenizer()
    instruction = signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    tokenizer.add_tokens(sorted({word for line in instruction for word in line.split()}))  # by letters it is long
    flow = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=scheduler or flow,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
