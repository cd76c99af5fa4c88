"""A tiny Lumina-Image 2.0 pipeline of the real classes."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from tests.tiny import tiny_vae


def tiny_gemma_tokenizer() -> GemmaTokenizer:
    """Gemma's tokenizer with one token per letter, and no merges."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\n", "\u2581", *map(chr, range(33, 127))]
    return GemmaTokenizer({word: index for index, word in enumerate(words)}, [], add_bos_token=True)


def tiny_gemma() -> Gemma2Model:
    """Two layers, one of each kind of attention, over the letters of the tokenizer and as many words."""
    config = Gemma2Config(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return Gemma2Model(config).eval()


def tiny_lumina2(*, seed: int = 0, **scheduler_changes: object) -> Lumina2Pipeline:
    """A whole Lumina 2 pipeline: a transformer with all three kinds of blocks, and one text encoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=4,
            hidden_size=32,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=16,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(300, 64, 64),
            cap_feat_dim=32,
        )
        for weights in transformer.layers.parameters():  # as they are made, a prompt hardly matters
            weights.data.mul_(1.5)
        vae = tiny_vae(scaling_factor=0.3611, shift_factor=0.1159)
        text_encoder = tiny_gemma()
    pipe = Lumina2Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler.from_config({"shift": 6.0, **scheduler_changes}),
        vae=vae.eval(),
        text_encoder=text_encoder,
        tokenizer=tiny_gemma_tokenizer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
