"""A tiny Z-Image pipeline of the real classes."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from tests.tiny import tiny_vae

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }} asks:\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_qwen_tokenizer() -> Qwen2Tokenizer:
    """Qwen's tokenizer with one token per byte, no merges, and a chat in its form."""
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [*sorted(ByteLevel.alphabet()), *marks]
    vocabulary = {word: index for index, word in enumerate(words)}
    return Qwen2Tokenizer(vocabulary, [], chat_template=CHAT, additional_special_tokens=marks[1:])


def tiny_z_image(*, seed: int = 0, **scheduler_changes: object) -> ZImagePipeline:
    """A whole Z-Image pipeline: a transformer with all three kinds of blocks, and one text encoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=4,
            n_kv_heads=4,
            cap_feat_dim=32,
            axes_dims=[4, 2, 2],
            axes_lens=[1024, 64, 64],
        )
        for weights in transformer.t_embedder.parameters():  # as they are made, it jumps about in time
            weights.data.mul_(0.25)
        vae = tiny_vae(scaling_factor=0.3611, shift_factor=0.1159)
        config = Qwen3Config(
            vocab_size=259,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        )
        text_encoder = Qwen3Model(config)
    pipe = ZImagePipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler.from_config({"shift": 6.0, **scheduler_changes}),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tiny_qwen_tokenizer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
