"""LoRA files in the dialects of other programs, by family: how layers are named there, and what can read what."""

from collections.abc import Mapping
from typing import Any

from rpo.adapters.formats.more_transformers import MORE_TRANSFORMERS
from rpo.adapters.formats.names import Names
from rpo.adapters.formats.transformers import TRANSFORMERS
from rpo.adapters.formats.unet import stable_diffusion, stable_diffusion_xl
from rpo.models.base import Family

FORMATS = ("diffusers", "peft", "kohya", "comfyui")
"""What a LoRA can be written as; the first two hold any, the others those of families with names there."""

UNETS = {
    "StableDiffusionPipeline": stable_diffusion,
    "StableDiffusionInstructPix2PixPipeline": stable_diffusion,
    "StableDiffusionXLPipeline": stable_diffusion_xl,
}
EDITORS = {
    "FluxKontextPipeline": "FluxPipeline",
    "QwenImageEditPipeline": "QwenImagePipeline",
    "QwenImageEditPlusPipeline": "QwenImagePipeline",
}
"""Editors with the network of another family."""

STOCK_KOHYA = ("StableDiffusion", "Flux", "Chroma", "QwenImage")
"""How the pipeline classes are called whose own loader reads kohya's files, but for SD3's. Z-Image's does, too, from
diffusers 0.42 on, and before fails on alpha keys."""

FLUX1_WIDTH = 3072
"""Of the layers of FLUX.1 and Chroma: written into the converter of stock diffusers."""


def names_of(family: Family, config: Mapping[str, Any]) -> Names | None:
    """How the layers of a family's denoiser, of this configuration, are called elsewhere; None where nowhere."""
    kind = family.pipelines[0]
    if kind in UNETS:
        return UNETS[kind](config.get("layers_per_block", 2))
    return (TRANSFORMERS | MORE_TRANSFORMERS).get(EDITORS.get(kind, kind))


def formats_for(family: Family) -> tuple[str, ...]:
    """What is written by default: what every program that knows the family reads; ComfyUI reads kohya's."""
    return FORMATS[:3] if names_of(family, {}) else FORMATS[:2]


def loads_kohya(family: Family, config: Mapping[str, Any]) -> bool:
    """Whether stock diffusers loads files in kohya's dialect for a denoiser of this configuration."""
    kind = EDITORS.get(family.pipelines[0], family.pipelines[0])
    if kind in ("FluxPipeline", "ChromaPipeline"):
        return config["num_attention_heads"] * config["attention_head_dim"] == FLUX1_WIDTH
    return kind.startswith(STOCK_KOHYA) and kind != "StableDiffusion3Pipeline"
