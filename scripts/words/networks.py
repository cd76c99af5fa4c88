"""The networks of the words checkpoint: those of shapes, for half as many cells with twice as many channels.

64 x 32 images become 8 x 4 cells of 8 latent channels: a letter fills one and a half cells, and four channels would not
hold its strokes. The text model sees one token for each letter, in a place of its own.
"""

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rpo.words.world import HEIGHT, WIDTH
from scripts.shapes.networks import TextToLatent

LATENT_CHANNELS = 8
CELL = 8
MAX_TOKENS = 12
"""Prompt length with both ends: `the word "`, five letters, the closing quote and one to spare."""

KNOWN = ("the", "word")
"""Words that are one token; of any other each letter is one."""

TEXT_WIDTH = 128
NETWORK_CHANNELS = (64, 128)


def build_vae() -> AutoencoderKL:
    """Make an untrained autoencoder of about one million parameters: 64x32 RGB to 8x4x8 latents."""
    channels = (16, 32, 32, 64)
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=WIDTH,
    )


def build_text_to_latent(tokenizer: CLIPTokenizer) -> TextToLatent:
    """Make an untrained denoiser of about four million parameters, and a text encoder of two layers."""
    unet = UNet2DConditionModel(
        sample_size=(HEIGHT // CELL, WIDTH // CELL),
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=NETWORK_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
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
