"""The networks of the words checkpoint: those of shapes, for cells of 4 pixels instead of 8.

48 x 16 images become 12 x 4 cells of 4 latent channels, so that a letter fills two by two of them. An autoencoder of
cells of 8 pixels would have to learn letters by heart: after 500 updates it had none of their strokes, where this one
had most after 150. The text model sees one token for each letter, in a place of its own.
"""

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rpo.words.world import HEIGHT, WIDTH
from scripts.shapes.networks import TextToLatent

LATENT_CHANNELS = 4
CELL = 4
MAX_TOKENS = 12
"""Prompt length with both ends: `the word "`, five letters, the closing quote and one to spare."""

KNOWN = ("the", "word")
"""Words that are one token; of any other each letter is one."""

NARROW = -4.0
"""Logarithm of the posteriors' variance in the beginning."""

TEXT_WIDTH = 96
NETWORK_CHANNELS = (48, 96)


def build_vae() -> AutoencoderKL:
    """Make an untrained autoencoder of 0.6 million parameters: 48x16 RGB to 12x4x4 latents.

    Its posteriors begin narrow: wide ones would hide the strokes that it is to learn.
    """
    channels = (16, 32, 64)
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=WIDTH,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        vae.quant_conv.bias[LATENT_CHANNELS:] = NARROW
    return vae


def build_text_to_latent(tokenizer: CLIPTokenizer) -> TextToLatent:
    """Make an untrained denoiser of about two million parameters, and a text encoder of two layers."""
    unet = UNet2DConditionModel(
        sample_size=(HEIGHT // CELL, WIDTH // CELL),
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=NETWORK_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),  # a cell of the second is about a letter
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return TextToLatent(unet, CLIPTextModel(text))
