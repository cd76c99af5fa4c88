"""kohya's dialect, which A1111, Forge and ComfyUI read, too: names with underscores, and a tensor of alpha each.

As in `lora_unet_<layer>.lora_down.weight`, `lora_te1_text_model_encoder_layers_0_….lora_up.weight` and `….alpha`.
Alpha is the highest rank for all layers: diffusers' converter for UNets reads a file wrong in which it differs.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from rpo.adapters.formats.layers import ALPHA, Layers, Sizes, Stored, refuse_unknown, stored, strengthened
from rpo.adapters.formats.names import Names, from_originals, to_originals
from rpo.adapters.formats.pattern import strength_of
from rpo.errors import InputError

UNET = "lora_unet_"
PREFIXES = (UNET, "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_")
CLIP = tuple(
    f"text_model.encoder.layers.{number}.{layer}"
    for number in range(48)
    for layer in (*(f"self_attn.{one}_proj" for one in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
)


def write(layers: Layers, names: Names, denoiser: str, sizes: Sizes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of the file."""
    named: Layers = {}
    for part in dict.fromkeys(name.partition(".")[0] for name in layers):
        own = {name.partition(".")[2]: one for name, one in layers.items() if name.startswith(f"{part}.")}
        if part == denoiser:
            refuse_unknown([name for name in own if name not in _ours(names)], "the LoRA")
            here = {name.partition(".")[2]: size for name, size in sizes.items() if name.startswith(f"{part}.")}
            own = own if names.kohya_keeps else to_originals(own, names, here, "the LoRA")
        elif part not in names.encoders:
            raise InputError(f"the LoRA adapts {part}, which kohya's dialect has no name for; leave that format out")
        prefix = UNET if part == denoiser else f"{names.encoders[part]}_"
        named |= {prefix + name.replace(".", "_"): one for name, one in own.items()}
    tensors: dict[str, Tensor] = {}
    rank = max(len(down) for down, _ in named.values())
    for name, factors in named.items():
        down, up = strengthened(factors, len(factors[0]) / rank)
        alpha = torch.tensor(float(rank), dtype=torch.float32, device="cpu")
        pair = {".lora_down.weight": down.contiguous(), ".lora_up.weight": up.contiguous(), ALPHA: alpha}
        tensors |= {name + ending: one for ending, one in pair.items()}
    told = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
    return tensors, {"format": "pt", **told}


def read(tensors: Mapping[str, Tensor], names: Names, denoiser: str, where: object) -> tuple[Layers, Stored]:
    """The layers of a file; SDXL's may have the names of either form."""
    found = stored(tensors, where)
    known = {UNET + name.replace(".", "_"): (name, True) for name in names.originals}
    known |= {UNET + name.replace(".", "_"): (name, False) for name in _ours(names)}
    encoders = {
        f"{prefix}_{name.replace('.', '_')}": f"{part}.{name}"
        for part, prefix in names.encoders.items()
        for name in CLIP
    }
    refuse_unknown([name for name in found.factors if name not in known and name not in encoders], where)
    layers: Layers = {}
    originals: Layers = {}
    for name, factors in found.factors.items():
        own = strengthened(factors, strength_of(name, len(factors[0]), {}, found.alphas.get(name)))
        if name in encoders:
            layers[encoders[name]] = own
        else:
            layer, is_original = known[name]
            (originals if is_original else layers)[layer if is_original else f"{denoiser}.{layer}"] = own
    layers |= {f"{denoiser}.{name}": one for name, one in from_originals(originals, names, where).items()}
    return layers, found


def _ours(names: Names) -> set[str]:
    return {ours for several in names.originals.values() for ours in several}
