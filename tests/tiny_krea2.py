"""A tiny Krea 2 pipeline of the real classes, with random weights; see `tests.tiny`."""

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Transformer2DModel
from transformers import Qwen2Tokenizer, Qwen3VLConfig, Qwen3VLModel

from tests.tiny_qwen_image import WORDS, tiny_qwen_vae

SCHEDULER = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "max_image_seq_len": 6400}
WIDTH, LAYERS = 16, (0, 1, 3)
NETWORK = {
    **{"in_channels": 16, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "intermediate_size": 32, "timestep_embed_dim": 32, "axes_dims_rope": (4, 6, 6)},
    **{"text_hidden_dim": WIDTH, "num_text_layers": len(LAYERS), "text_num_attention_heads": 2},
    **{"text_num_key_value_heads": 2, "text_intermediate_size": 32, "num_layerwise_text_blocks": 1},
}


class Krea2Pipeline(diffusers.Krea2Pipeline):
    """One that draws 64 px where nobody says how large: that is written in its call."""

    def __call__(self, prompt, *, height=64, width=64, num_inference_steps=28, guidance_scale=4.5, **options):
        size = {"height": height, "width": width}
        told = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        return super().__call__(prompt, **size, **told, **options)


def tiny_qwen3_vl() -> Qwen3VLModel:
    """Three layers that read, and one that could see."""
    vision = {
        **{"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH},
        **{"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    }
    text = {
        **{"vocab_size": len(WORDS), "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 3},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.3},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
    }
    return Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision))


def tiny_krea2(*, is_distilled: bool = False, seed: int = 0, **scheduler_changes: object) -> Krea2Pipeline:
    """A whole Krea 2 pipeline."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = Krea2Transformer2DModel(**NETWORK)
        for name, weights in transformer.named_parameters():  # as they are made, attention hardly matters
            if ".attn." in name and not name.startswith("text_fusion"):
                weights.data.mul_(1.5)
        transformer.time_mod_proj.bias.data.normal_()
        transformer.time_embed.linear_1.weight.data.mul_(0.3)  # and time too fast
        vae, text_encoder = tiny_qwen_vae(), tiny_qwen3_vl()
    pipe = Krea2Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER | scheduler_changes),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=Qwen2Tokenizer({word: index for index, word in enumerate(WORDS)}, []),
        text_encoder_select_layers=LAYERS,
        is_distilled=is_distilled,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
