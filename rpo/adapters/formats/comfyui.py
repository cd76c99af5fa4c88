"""ComfyUI's plainest dialect: the original names behind `diffusion_model.`, as ai-toolkit has them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rpo.adapters.formats.layers import ALPHA, Layers, Sizes, Stored, stored, strengthened
from rpo.adapters.formats.names import Names, from_originals, to_originals
from rpo.adapters.formats.pattern import strength_of
from rpo.errors import InputError

PREFIX = "diffusion_model."


def write(layers: Layers, names: Names, denoiser: str, sizes: Sizes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of the file; text encoders keep diffusers' names, which ComfyUI knows."""
    start = f"{denoiser}."
    own = {name.removeprefix(start): one for name, one in layers.items() if name.startswith(start)}
    rest = {name: one for name, one in layers.items() if not name.startswith(start)}
    if strange := [name for name in rest if name.partition(".")[0] not in names.encoders]:
        raise InputError(f"the LoRA adapts {strange[0]}, which ComfyUI has no name for; leave that format out")
    here = {name.removeprefix(start): size for name, size in sizes.items() if name.startswith(start)}
    named = {PREFIX + name: one for name, one in to_originals(own, names, here, "the LoRA").items()}
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in {**named, **rest}.items():
        alpha = torch.tensor(float(len(down)), dtype=torch.float32, device="cpu")
        pair = {".lora_A.weight": down.contiguous(), ".lora_B.weight": up.contiguous(), ALPHA: alpha}
        tensors |= {name + ending: one for ending, one in pair.items()}
    return tensors, {"format": "pt"}


def read(tensors: Mapping[str, Tensor], names: Names, denoiser: str, where: object) -> tuple[Layers, Stored]:
    """The layers of a file, whose denoiser's may have diffusers' names, too."""
    found = stored(tensors, where)
    strong = {
        name: strengthened(factors, strength_of(name, len(factors[0]), {}, found.alphas.get(name)))
        for name, factors in found.factors.items()
    }
    own = {name.removeprefix(PREFIX): one for name, one in strong.items() if name.startswith(PREFIX)}
    ours = {one for several in names.originals.values() for one in several if one not in names.originals}
    layers = {f"{denoiser}.{name}": one for name, one in own.items() if name in ours}
    theirs = {name: one for name, one in own.items() if name not in ours}
    layers |= {f"{denoiser}.{name}": one for name, one in from_originals(theirs, names, where).items()}
    return layers | {name: one for name, one in strong.items() if not name.startswith(PREFIX)}, found
