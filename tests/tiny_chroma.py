"""A tiny Chroma pipeline of the real classes, with random weights; see `tests.tiny`."""

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import T5Config, T5EncoderModel

from tests.tiny import TEXT_DIM, tiny_t5_tokenizer
from tests.tiny_flux1 import tiny_flux_vae


def tiny_chroma(*, seed: int = 0, **scheduler_changes: object) -> ChromaPipeline:
    """A whole Chroma pipeline: a transformer with both kinds of blocks, and T5."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT_DIM,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=16,
            approximator_hidden_dim=32,
            approximator_layers=1,
        )
        for weights in transformer.distilled_guidance_layer.out_proj.parameters():
            weights.data.mul_(0.3)  # as they are made, what they modulate is not smooth in time
        vae = tiny_flux_vae()
        t5 = T5EncoderModel(T5Config(vocab_size=128, d_model=TEXT_DIM, d_kv=8, d_ff=64, num_layers=2, num_heads=4))
    pipe = ChromaPipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler.from_config({"use_dynamic_shifting": True} | scheduler_changes),
        vae=vae.eval(),
        text_encoder=t5.eval(),
        tokenizer=tiny_t5_tokenizer(),
    )
    pipe.default_sample_size = 8
    pipe.set_progress_bar_config(disable=True)
    return pipe
