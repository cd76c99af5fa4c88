"""Tiny pipelines of the real diffusers and transformers classes, with random weights: built in memory, no network.

The latent is 8 x 8 x 4 (64 px images), as for `rpo.shapes`. The same `seed` gives the same weights; the global
generator is left as it was.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils.logging import disable_progress_bar
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

TEXT_DIM = 32
BOS, EOS = "<|startoftext|>", "<|endoftext|>"

disable_progress_bar()


def tiny_tokenizer(max_length: int = 77) -> CLIPTokenizer:
    """CLIP's tokenizer with one token per byte and no merges."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), BOS, EOS]
    return CLIPTokenizer({word: index for index, word in enumerate(words)}, [], model_max_length=max_length)


def tiny_text_config(*, projection_dim: int = TEXT_DIM) -> CLIPTextConfig:
    """Two layers over the byte vocabulary; the special ids lie inside it, since pooling looks for the end token."""
    size = 2 * len(ByteLevel.alphabet()) + 2
    return CLIPTextConfig(
        vocab_size=size,
        hidden_size=TEXT_DIM,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        projection_dim=projection_dim,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )


def tiny_unet(*, in_channels: int = 4, channels: tuple[int, ...] = (16, 32)) -> UNet2DConditionModel:
    """An SD 1.x UNet in small: the first level convolves only, every other one also attends to the prompt."""
    levels = len(channels)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        layers_per_block=1,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * (levels - 1)),
        up_block_types=(*("CrossAttnUpBlock2D",) * (levels - 1), "UpBlock2D"),
        cross_attention_dim=TEXT_DIM,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def tiny_vae(**changes: Any) -> AutoencoderKL:
    """Eight-fold down-sampling to 4 channels, by default with SD 1.x's scaling factor (the class's default)."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        **changes,
    )


def tiny_scheduler(prediction_type: str = "epsilon", **changes: object) -> DDIMScheduler:
    """The schedule of Stable Diffusion 1.x, as its checkpoints ship it."""
    config: dict[str, object] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": prediction_type,
    }
    return DDIMScheduler.from_config(config | changes)


def tiny_sd(
    prediction_type: str = "epsilon",
    *,
    in_channels: int = 4,
    channels: tuple[int, ...] = (16, 32),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **scheduler_changes: object,
) -> StableDiffusionPipeline:
    """A whole Stable Diffusion 1.x pipeline on the CPU, in about a tenth of a second.

    Args:
        prediction_type: "epsilon", "v_prediction" or "sample".
        in_channels: 4; 9 for the UNet of an inpainting checkpoint, 8 for that of InstructPix2Pix.
        channels: Width of each UNet level.
        dtype: Of the three networks.
        seed: Of the random weights.
        **scheduler_changes: Fields of `DDIMScheduler` that differ from SD 1.x, such as `timestep_spacing`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = tiny_unet(in_channels=in_channels, channels=channels)
        vae = tiny_vae()
        text_encoder = CLIPTextModel(tiny_text_config())
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tiny_tokenizer(),
        unet=unet.eval(),
        scheduler=tiny_scheduler(prediction_type, **scheduler_changes),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    if dtype != torch.float32:
        pipe.to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sdxl(prediction_type: str = "epsilon", *, seed: int = 0) -> StableDiffusionXLPipeline:
    """A whole SDXL pipeline: two text encoders, pooled text and sizes as added conditions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=2 * TEXT_DIM,
            attention_head_dim=2,
            norm_num_groups=4,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=TEXT_DIM + 6 * 8,
        )
        vae = tiny_vae()
        text_encoder = CLIPTextModel(tiny_text_config())
        text_encoder_2 = CLIPTextModelWithProjection(tiny_text_config())
    pipe = StableDiffusionXLPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        text_encoder_2=text_encoder_2.eval(),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=unet.eval(),
        scheduler=tiny_scheduler(prediction_type),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_t5_tokenizer() -> T5Tokenizer:
    """T5's tokenizer over single letters."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    return T5Tokenizer(vocab=special + [(chr(code), -3.0) for code in range(32, 127)], extra_ids=0)


def tiny_sd3(*, with_t5: bool = True, seed: int = 0, **scheduler_changes: object) -> StableDiffusion3Pipeline:
    """A whole Stable Diffusion 3 pipeline: a transformer, two CLIP text encoders and T5."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=2 * TEXT_DIM,
            caption_projection_dim=32,
            pooled_projection_dim=2 * TEXT_DIM,
            pos_embed_max_size=16,
        )
        vae = tiny_vae(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
        clips = [CLIPTextModelWithProjection(tiny_text_config()) for _ in range(2)]
        t5 = T5EncoderModel(T5Config(vocab_size=128, d_model=2 * TEXT_DIM, d_kv=8, d_ff=64, num_layers=2, num_heads=4))
    pipe = StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler.from_config({"shift": 3.0, **scheduler_changes}),
        vae=vae.eval(),
        text_encoder=clips[0].eval(),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=clips[1].eval(),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=t5.eval() if with_t5 else None,
        tokenizer_3=tiny_t5_tokenizer() if with_t5 else None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_tiny_sd(folder: Path, prediction_type: str = "epsilon", *, seed: int = 0) -> Path:
    """Write `tiny_sd(prediction_type)` as a diffusers folder and return it."""
    tiny_sd(prediction_type, seed=seed).save_pretrained(folder)
    return folder
