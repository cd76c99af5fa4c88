"""A tiny Qwen-Image pipeline of the real classes, with random weights; see `tests.tiny`."""

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from tests.tiny import TEXT_DIM

WORDS = (*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>")
SCHEDULER = {"use_dynamic_shifting": True, "shift": 1.0, "base_shift": 0.5, "max_shift": 0.9, "shift_terminal": 0.02}


def tiny_qwen(words: int = len(WORDS), **config: int) -> Qwen2_5_VLForConditionalGeneration:
    """Two layers that read, and one that could see."""
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT_DIM}
    text = {
        **{"vocab_size": words, "hidden_size": TEXT_DIM, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"bos_token_id": None, "eos_token_id": None},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
    }
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **config))


def tiny_qwen_vae() -> AutoencoderKLQwenImage:
    """Eight-fold down-sampling of frames to 4 channels, each with moments of its own."""
    mean, std = [-0.7, 0.2, 0.0, 1.1], [2.8, 1.4, 2.3, 1.2]
    return AutoencoderKLQwenImage(base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=mean, latents_std=std)


def tiny_qwen_image(*, seed: int = 0, **scheduler_changes: object) -> QwenImagePipeline:
    """A whole Qwen-Image pipeline."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT_DIM,
            axes_dims_rope=(4, 6, 6),
        )
        for name, weights in transformer.named_parameters():  # as they are made, attention hardly matters
            if ".attn." in name:
                weights.data.mul_(1.5)
        vae, text_encoder = tiny_qwen_vae(), tiny_qwen()
    pipe = QwenImagePipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER | scheduler_changes),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=Qwen2Tokenizer({word: index for index, word in enumerate(WORDS)}, []),
    )
    pipe.default_sample_size = 8
    pipe.set_progress_bar_config(disable=True)
    return pipe
