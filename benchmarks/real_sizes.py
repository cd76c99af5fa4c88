"""The architectures of released checkpoints at their real size: configurations without weights, and weights of chance.

Written from the published configurations; the number of parameters of each part is the published one, which
`real_size.py count` checks.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTokenizer, T5Config, T5Tokenizer

CLIP_VOCABULARY = 49_408

CLIP_L = ("CLIPTextModel", {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12})
CLIP_L_PROJECTED = ("CLIPTextModelWithProjection", CLIP_L[1] | {"projection_dim": 768})
CLIP_G = (
    "CLIPTextModelWithProjection",
    {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    },
)
T5_XXL = (
    "T5EncoderModel",
    {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"},
)

VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}

BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@dataclass(frozen=True)
class Architecture:
    """One checkpoint's."""

    pipeline: str
    denoiser: tuple[str, str, dict[str, Any]]
    """Name of the part, its class, its configuration."""
    vae: dict[str, Any]
    texts: tuple[tuple[str, dict[str, Any]], ...]
    scheduler: tuple[str, dict[str, Any]]
    parameters: dict[str, int]
    """As published, by part."""
    absent: tuple[str, ...] = ()
    """Parts of the pipeline that are left out."""


SIZES = {
    "sd15": Architecture(
        "StableDiffusionPipeline",
        ("unet", "UNet2DConditionModel", {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}),
        VAE,
        (CLIP_L,),
        ("DDIMScheduler", BETAS),
        {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
        ("safety_checker", "feature_extractor"),
    ),
    "sdxl": Architecture(
        "StableDiffusionXLPipeline",
        (
            "unet",
            "UNet2DConditionModel",
            {
                "sample_size": 128,
                "block_out_channels": (320, 640, 1280),
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "transformer_layers_per_block": (1, 2, 10),
                "attention_head_dim": (5, 10, 20),
                "cross_attention_dim": 2048,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
                "use_linear_projection": True,
            },
        ),
        VAE | {"scaling_factor": 0.13025, "sample_size": 1024},
        (CLIP_L, CLIP_G),
        ("DDIMScheduler", BETAS),
        {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
    ),
    "sd35_medium": Architecture(
        "StableDiffusion3Pipeline",
        (
            "transformer",
            "SD3Transformer2DModel",
            {
                "sample_size": 128,
                "in_channels": 16,
                "out_channels": 16,
                "num_layers": 24,
                "attention_head_dim": 64,
                "num_attention_heads": 24,
                "joint_attention_dim": 4096,
                "caption_projection_dim": 1536,
                "pooled_projection_dim": 2048,
                "pos_embed_max_size": 384,
                "dual_attention_layers": tuple(range(13)),
                "qk_norm": "rms_norm",
            },
        ),
        VAE
        | {
            "latent_channels": 16,
            "scaling_factor": 1.5305,
            "shift_factor": 0.0609,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "sample_size": 1024,
        },
        (CLIP_L_PROJECTED, CLIP_G, T5_XXL),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        {
            "transformer": 2_243_171_520,
            "vae": 83_819_683,
            "text_encoder": 123_650_304,
            "text_encoder_2": 694_659_840,
            "text_encoder_3": 4_762_310_656,
        },
    ),
    "flux1_dev": Architecture(
        "FluxPipeline",
        ("transformer", "FluxTransformer2DModel", {"guidance_embeds": True}),
        VAE
        | {
            "latent_channels": 16,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "sample_size": 1024,
        },
        (CLIP_L, T5_XXL),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True}),
        {
            "transformer": 11_901_408_320,
            "vae": 83_819_683,
            "text_encoder": 123_060_480,
            "text_encoder_2": 4_762_310_656,
        },
    ),
}


IN_SMALL: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 64},
    "sdxl": {
        "block_out_channels": (32, 64, 64),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 4, 4),
        "cross_attention_dim": 128,
        "projection_class_embeddings_input_dim": 64 + 6 * 256,
    },
    "sd35_medium": {
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 128,
        "caption_projection_dim": 64,
        "pooled_projection_dim": 128,
        "dual_attention_layers": (0,),
    },
}
"""What is narrower in a denoiser for a rehearsal."""

CLIP_IN_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": 64,
}
T5_IN_SMALL = {"d_model": 128, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}


def in_small(name: str) -> Architecture:
    """The same parts with few and narrow layers: to rehearse on a processor what is measured on a GPU."""
    size = SIZES[name]
    part, cls, config = size.denoiser
    texts = [(kind, text | (T5_IN_SMALL if kind.startswith("T5") else CLIP_IN_SMALL)) for kind, text in size.texts]
    narrow = {"block_out_channels": (32,) * 4, "layers_per_block": 1}
    return replace(
        size, denoiser=(part, cls, config | IN_SMALL[name]), vae=size.vae | narrow, texts=tuple(texts), parameters={}
    )


def text_config(cls: str, config: dict[str, Any]) -> Any:
    """A text encoder's configuration, with the real vocabulary."""
    if cls.startswith("T5"):
        return T5Config(vocab_size=32_128, is_encoder_decoder=False, **config)
    marks = {"bos_token_id": CLIP_VOCABULARY - 2, "eos_token_id": CLIP_VOCABULARY - 1, "pad_token_id": 1}
    return CLIPTextConfig(vocab_size=CLIP_VOCABULARY, **{"num_attention_heads": 12} | config | marks)


def tokenizer_of(cls: str) -> Any:
    """One that knows letters, and CLIP's marks where they are in the real vocabulary."""
    if cls.startswith("T5"):
        special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
        return T5Tokenizer(vocab=[*special, *((chr(code), -3.0) for code in range(32, 127))], extra_ids=0)
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += [f"<unused {number}>" for number in range(CLIP_VOCABULARY - 2 - len(words))]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({word: index for index, word in enumerate(words)}, [], model_max_length=77)


def parts(size: Architecture, make: Callable[[Callable[[], nn.Module]], nn.Module]) -> dict[str, Any]:
    """All parts of a pipeline by name; networks as `make` makes them of their constructors."""
    name, cls, config = size.denoiser
    found: dict[str, Any] = {
        name: make(lambda: getattr(diffusers, cls)(**config)),
        "vae": make(lambda: diffusers.AutoencoderKL(**size.vae)),
        "scheduler": getattr(diffusers, size.scheduler[0])(**size.scheduler[1]),
    }
    for number, (kind, text) in enumerate(size.texts, 1):
        end = "" if number == 1 else f"_{number}"
        found[f"text_encoder{end}"] = make(lambda k=kind, t=text: getattr(transformers, k)(text_config(k, t)))
        found[f"tokenizer{end}"] = tokenizer_of(kind)
    return found


def unloaded(build: Callable[[], nn.Module]) -> nn.Module:
    """On the meta device."""
    with torch.device("meta"):
        return build()


def random(dtype: torch.dtype, device: str = "cpu") -> Callable[[Callable[[], nn.Module]], nn.Module]:
    """Makes networks of random weights that keep their inputs about as large as they were; each is made once."""

    def make(build: Callable[[], nn.Module]) -> nn.Module:
        with init_empty_weights(include_buffers=False):
            network = build()
        made: dict[int, nn.Parameter] = {}
        for module in network.modules():
            for name, one in module._parameters.items():
                if one is not None:
                    made[id(one)] = module._parameters[name] = made.get(id(one)) or _drawn(one, name, dtype, device)
        return network.eval()

    return make


def _drawn(like: nn.Parameter, name: str, dtype: torch.dtype, device: str) -> nn.Parameter:
    tensor = torch.full(like.shape, float(like.ndim == 1 and name == "weight"), dtype=dtype, device=device)
    if like.ndim > 1:
        tensor.normal_(std=like[0].numel() ** -0.5)
    return nn.Parameter(tensor, requires_grad=False)


def write_configs(size: Architecture, folder: Path) -> Path:
    """A diffusers folder without weights, as `rpo plan` reads one."""
    index: dict[str, Any] = {"_class_name": size.pipeline, "_diffusers_version": diffusers.__version__}
    index |= {name: [None, None] for name in size.absent}
    for name, part in parts(size, unloaded).items():
        index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
        if isinstance(part, transformers.PreTrainedModel):
            part.config.save_pretrained(folder / name)
        elif isinstance(part, nn.Module):
            part.save_config(folder / name)  # pyright: ignore[reportCallIssue]
        else:
            part.save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps(index), "utf-8")
    return folder
