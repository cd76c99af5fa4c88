"""A tiny FLUX.1 pipeline of the real classes, with random weights; see `tests.tiny`."""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from tests.tiny import TEXT_DIM, tiny_t5_tokenizer, tiny_text_config, tiny_tokenizer

SCHEDULER = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}


def tiny_flux_vae() -> AutoencoderKL:
    """Eight-fold down-sampling to 4 channels, scaled and shifted as FLUX.1's."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def tiny_flux1(*, guidance_embeds: bool = True, seed: int = 0, **scheduler_changes: object) -> FluxPipeline:
    """A whole FLUX.1 [dev] pipeline: a transformer with both kinds of blocks, CLIP and T5."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT_DIM,
            pooled_projection_dim=TEXT_DIM,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        )
        vae = tiny_flux_vae()
        clip = CLIPTextModel(tiny_text_config())
        t5 = T5EncoderModel(T5Config(vocab_size=128, d_model=TEXT_DIM, d_kv=8, d_ff=64, num_layers=2, num_heads=4))
    pipe = FluxPipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER | scheduler_changes),
        vae=vae.eval(),
        text_encoder=clip.eval(),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=t5.eval(),
        tokenizer_2=tiny_t5_tokenizer(),
    )
    pipe.default_sample_size = 8
    pipe.set_progress_bar_config(disable=True)
    return pipe
