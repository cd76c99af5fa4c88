"""The LoRAs that a network carries, all of them as one, and the sizes of its layers."""

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rpo.adapters.formats.diffusers import canonical
from rpo.adapters.formats.layers import Layers, Sizes
from rpo.errors import InputError
from rpo.models.checkpoint import Checkpoint
from rpo.models.distilled import ASSISTANT


def layers_of(model: Checkpoint) -> Layers:
    """What a checkpoint's adapters do together, without an assistant."""
    found: Layers = {}
    for part, network in ((model.family.denoiser, model.denoiser), *model.text_encoders.items()):
        layers = [one for one in network.modules() if isinstance(one, LoraLayer)]
        names = [one for one in dict.fromkeys(name for layer in layers for name in layer.lora_A) if one != ASSISTANT]
        if names and any(layer.use_dora.get(name) for layer in layers for name in names):
            raise InputError(
                f"an adapter of {part} is a DoRA, which is no pair of factors; expected a plain LoRA, or one made of "
                "it: rpo export FILE --base MODEL --rank N"
            )
        found |= {f"{part}.{canonical(layer)}": one for layer, one in factors_of(network, names).items()}
    if not found:
        raise InputError("the model carries no adapter, so there is no LoRA to save; call add_lora (or train) first")
    return found


def factors_of(network: nn.Module, adapters: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every layer of a network that some adapters change, side by side, float32; see `adapters.stack`."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    layers: list[tuple[str, Any]] = [one for one in network.named_modules() if isinstance(one[1], LoraLayer)]
    for name, layer in layers:
        if own := [one for one in adapters if one in layer.lora_A]:
            downs = [layer.lora_A[one].weight.detach().float() for one in own]
            ups = [layer.lora_B[one].weight.detach().float() * layer.scaling[one] for one in own]
            found[name] = torch.cat(downs), torch.cat(ups, dim=1)
    return found


def sizes_of(pipe: Any, parts: Sequence[str]) -> Sizes:
    """How many numbers each layer of a pipeline's parts puts out and takes in, which a LoRA can adapt."""
    sizes: dict[str, tuple[int, int]] = {}
    for part in parts:
        for name, one in pipe.components[part].named_modules() if pipe.components[part] is not None else ():
            if isinstance(one, nn.Linear | nn.Conv2d) and ".lora_" not in name:
                ends = (
                    ("out_features", "in_features") if isinstance(one, nn.Linear) else ("out_channels", "in_channels")
                )
                rows, columns = (int(getattr(one, end)) for end in ends)
                sizes[f"{part}.{canonical(name.removesuffix('.base_layer'))}"] = rows, columns
    return sizes
