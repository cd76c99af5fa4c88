"""A tiny PixArt-Sigma pipeline of the real classes."""

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from transformers import T5Config, T5EncoderModel

from tests.tiny import tiny_t5_tokenizer, tiny_vae


def tiny_pixart_sigma(*, seed: int = 0) -> PixArtSigmaPipeline:
    """A whole PixArt-Sigma pipeline: a transformer with twice the latents' channels, and one text encoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = PixArtTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=2,
            cross_attention_dim=32,
            sample_size=8,
            caption_channels=32,
        )
        vae = tiny_vae(scaling_factor=0.13025)
        text_encoder = T5EncoderModel(T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4))
    # The checkpoints end at 0.02, where the noise that random weights predict would leave a huge image.
    betas = {"beta_start": 0.0001, "beta_end": 0.006, "beta_schedule": "linear"}
    scheduler = DPMSolverMultistepScheduler(**betas, timestep_spacing="trailing")
    pipe = PixArtSigmaPipeline(
        tokenizer=tiny_t5_tokenizer(),
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
