"""What the names and notes of a LoRA file tell without its base: the networks that it adapts, and alpha."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rpo.adapters.formats.diffusers import NOTE
from rpo.adapters.formats.layers import ALPHA, ENDINGS
from rpo.adapters.formats.pattern import strength_of
from rpo.adapters.formats.peft import PREFIX, SETTINGS
from rpo.files.text import read_text

DOWN, UP = tuple(ENDINGS), tuple(ENDINGS.values())
"""Endings of the two factors in every dialect."""

PARTS = {
    **{"lora_unet_": "denoiser", "diffusion_model.": "denoiser", PREFIX: "denoiser"},
    **{"lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"},
}


def part_of(name: str) -> str:
    """The network that a tensor belongs to."""
    return next((part for start, part in PARTS.items() if name.startswith(start)), name.partition(".")[0])


def alphas_of(file: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> list[tuple[float | None, bool]]:
    """For each layer alpha, None where nothing is said, and whether every program applies it as strongly."""
    told: dict[str, Any] = json.loads(header.get(NOTE, "{}"))
    beside = file.with_name(SETTINGS)
    of_peft = json.loads(read_text(beside)) if beside.is_file() else {}
    found: list[tuple[float | None, bool]] = []
    for name, down in tensors.items():
        if ending := next((one for one in DOWN if name.endswith(one)), None):
            stem, rank = name.removesuffix(ending), len(down)
            part, _, layer = stem.partition(".")
            own = {key.removeprefix(f"{part}."): one for key, one in told.items() if key.startswith(f"{part}.")}
            in_file = tensors[stem + ALPHA].item() if stem + ALPHA in tensors else None
            layer, settings = (stem.removeprefix(PREFIX), of_peft) if of_peft else (layer, own)
            is_said = in_file is not None or bool(settings)
            alpha = rank * strength_of(layer, rank, settings, in_file) if is_said else None
            found.append((alpha, alpha is None or alpha == rank or in_file is not None))
    return found
