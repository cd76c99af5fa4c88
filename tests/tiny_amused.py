"""A tiny aMUSEd pipeline of the real classes: 8 x 8 tokens of a codebook of 16, for images of 64 px."""

import torch
from diffusers import AmusedPipeline, AmusedScheduler, UVit2DModel, VQModel
from transformers import CLIPTextModelWithProjection

from tests.tiny import TEXT_DIM, tiny_text_config, tiny_tokenizer

CODES = 16


def tiny_amused(*, seed: int = 0, masking_schedule: str = "cosine") -> AmusedPipeline:
    """A whole masked-token generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = UVit2DModel(
            hidden_size=32,
            cond_embed_dim=TEXT_DIM,
            micro_cond_encode_dim=8,
            micro_cond_embed_dim=40,
            encoder_hidden_size=TEXT_DIM,
            vocab_size=CODES + 2,
            codebook_size=CODES,
            in_channels=32,
            block_out_channels=32,
            num_res_blocks=1,
            block_num_heads=4,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=64,
            sample_size=8,
        )
        vqvae = VQModel(
            block_out_channels=(16, 16, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=8,
            num_vq_embeddings=CODES,
            norm_num_groups=8,
            mid_block_add_attention=False,
            lookup_from_codebook=True,
            force_upcast=True,
        )
        torch.nn.init.normal_(vqvae.quantize.embedding.weight)
        text_encoder = CLIPTextModelWithProjection(tiny_text_config())
    pipe = AmusedPipeline(
        vqvae=vqvae.eval(),
        tokenizer=tiny_tokenizer(),
        text_encoder=text_encoder.eval(),
        transformer=transformer.eval(),
        scheduler=AmusedScheduler(mask_token_id=CODES + 1, masking_schedule=masking_schedule),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
