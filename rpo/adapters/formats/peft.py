"""peft's own folder of one network: `PeftModel.from_pretrained(network, folder)` reads it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor

from rpo.adapters.formats.diffusers import LEVEL, canonical
from rpo.adapters.formats.layers import Layers, Stored, stored, strengthened
from rpo.adapters.formats.pattern import settings_of, strength_of
from rpo.errors import InputError
from rpo.files.text import read_text

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
UNET_BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.", "conv_in.", "conv_out.", "time_embedding.", "add_embedding.")


def write(layers: Layers, *, is_flat: bool) -> tuple[dict[str, Tensor], str]:
    """Tensors and settings of one network's layers, which are named without its part.

    Args:
        is_flat: Whether it is a text encoder without CLIP's level `text_model`.
    """
    named = {name.removeprefix(LEVEL) if is_flat else name: one for name, one in layers.items()}
    tensors = {f"{PREFIX}{name}.lora_A.weight": down.contiguous() for name, (down, _) in named.items()}
    tensors |= {f"{PREFIX}{name}.lora_B.weight": up.contiguous() for name, (_, up) in named.items()}
    config: Any = LoraConfig(**settings_of({name: len(down) for name, (down, _) in named.items()}), inference_mode=True)
    told = {name: sorted(one) if isinstance(one, set) else one for name, one in config.to_dict().items()}
    return tensors, json.dumps(told, indent=2, sort_keys=True) + "\n"


def read(tensors: Mapping[str, Tensor], file: Path, part: str) -> tuple[Layers, Stored]:
    """The layers of a peft file, under a part's name; without its settings beside it nobody knows its strength."""
    beside = file.with_name(SETTINGS)
    if not beside.is_file():
        raise InputError(
            f"{file} has peft's names, but there is no {SETTINGS} beside it, which says how strong it is; expected "
            "both in one folder: give the folder that save_pretrained wrote"
        )
    settings = json.loads(read_text(beside))
    kind = str(settings.get("peft_type", "LORA")).upper()
    if kind != "LORA":
        raise InputError(f"{file.parent} is a {kind}; expected a LoRA; convert it with peft, or give another")
    found = stored(tensors, file)
    layers: Layers = {}
    for name, factors in found.factors.items():
        layer = name.removeprefix(PREFIX)
        strength = strength_of(layer, len(factors[0]), settings, found.alphas.get(name))
        own = part or ("unet" if layer.startswith(UNET_BLOCKS) else "transformer")
        layers[f"{own}.{canonical(layer)}"] = strengthened(factors, strength)
    return layers, found
