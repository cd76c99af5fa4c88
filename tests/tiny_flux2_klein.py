"""A tiny FLUX.2 [klein] pipeline of the real classes, with random weights; see `tests.tiny`."""

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from tests.tiny_qwen_image import WORDS

SCHEDULER = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}
CHAT = "{% for one in messages %}<|im_start|>{{ one.role }}\n{{ one.content }}<|im_end|>\n{% endfor %}"
CHAT += "{% if add_generation_prompt %}<|im_start|>{% endif %}{% if not enable_thinking %}<think>{% endif %}"


def tiny_qwen3() -> Qwen3ForCausalLM:
    """As deep as the last of the layers that are read, the 27th."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "head_dim": 8, "initializer_range": 0.3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=len(WORDS), num_hidden_layers=28, **sizes, **heads))


def tiny_flux2_vae() -> AutoencoderKLFlux2:
    """Eight-fold down-sampling to 4 channels, 16 of whose cells' numbers have known moments."""
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, norm_num_groups=4, layers_per_block=1, sample_size=64
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def tiny_flux2_klein(*, is_distilled: bool = False, seed: int = 0, **scheduler_changes: object) -> Flux2KleinPipeline:
    """A whole FLUX.2 [klein] pipeline: a transformer with both kinds of blocks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        )
        vae, text_encoder = tiny_flux2_vae(), tiny_qwen3()
    pipe = Flux2KleinPipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER | scheduler_changes),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=Qwen2Tokenizer({word: index for index, word in enumerate(WORDS)}, [], chat_template=CHAT),
        is_distilled=is_distilled,
    )
    pipe.default_sample_size = 8
    pipe.set_progress_bar_config(disable=True)
    return pipe
