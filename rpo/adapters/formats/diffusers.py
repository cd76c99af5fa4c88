"""diffusers' own dialect: what `pipe.load_lora_weights` reads, beside a note of rank and alpha for each network.

There are no alpha keys: the loaders of most families refuse a file with any, those of FLUX.1 and Chroma one that has
the note, too, and Z-Image's and Qwen-Image's take it for one of another program. Alpha is the rank instead.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from rpo.adapters.formats.layers import Layers, Stored, stored, strengthened
from rpo.adapters.formats.pattern import settings_of, strength_of

NOTE = "lora_adapter_metadata"
"""Where diffusers looks for the settings of the adapters in a file's header."""

LEVEL = "text_model."
"""A level of CLIP's text encoder that some classes of transformers 5 have not; older ones and other programs have."""

CLIP_LAYERS = "encoder.layers."

WITH_UNET = (".lora.down.weight", ".lora.up.weight")
IN_ENCODERS = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
OTHERWISE = (".lora_A.weight", ".lora_B.weight")


def write(layers: Layers, flat: Collection[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of the file.

    Args:
        flat: Text encoders without CLIP's level `text_model`; diffusers looks for their layers' own names before 0.42.
    """
    tensors: dict[str, Tensor] = {}
    settings: dict[str, object] = {}
    for part in dict.fromkeys(name.partition(".")[0] for name in layers):
        own = {name.partition(".")[2]: one for name, one in layers.items() if name.startswith(f"{part}.")}
        own = {name.removeprefix(LEVEL) if part in flat else name: one for name, one in own.items()}
        endings = WITH_UNET if part == "unet" else IN_ENCODERS if part.startswith("text_encoder") else OTHERWISE
        for name, factors in own.items():
            for ending, one in zip(endings, factors, strict=True):
                tensors[f"{part}.{name}{ending}"] = one.contiguous()
        ranks = {name.removeprefix(LEVEL): len(down) for name, (down, _) in own.items()}
        settings |= {f"{part}.{name}": value for name, value in settings_of(ranks).items()}
    return tensors, {NOTE: json.dumps(settings, indent=2, sort_keys=True), "format": "pt"}


def read(tensors: Mapping[str, Tensor], header: Mapping[str, str], where: object) -> tuple[Layers, Stored]:
    """The layers of a file, with the strength that its note, its alpha keys or their absence give it."""
    found = stored(tensors, where)
    settings: dict[str, Any] = json.loads(header.get(NOTE, "{}"))
    layers: Layers = {}
    for name, factors in found.factors.items():
        part, _, layer = name.partition(".")
        own = {key.removeprefix(f"{part}."): one for key, one in settings.items() if key.startswith(f"{part}.")}
        strength = strength_of(layer, len(factors[0]), own, found.alphas.get(name))
        layers[f"{part}.{canonical(layer)}"] = strengthened(factors, strength)
    return layers, found


def canonical(layer: str) -> str:
    """Some old files' names of attention, and the level of CLIP's text encoder, in one form."""
    layer = layer.replace(".processor.", ".")
    for one in ("to_q", "to_k", "to_v"):
        layer = layer.removesuffix(f"{one}_lora") + one if layer.endswith(f".{one}_lora") else layer
    return LEVEL + layer if layer.startswith(CLIP_LAYERS) else layer
