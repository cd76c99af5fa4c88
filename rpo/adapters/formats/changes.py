"""What changed a checkpoint's weights, layer by layer: a LoRA, a DoRA, or training all of them."""

import copy
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from rpo.adapters.formats.diffusers import canonical
from rpo.adapters.formats.layers import Layers
from rpo.adapters.formats.nearest import Change, nearest
from rpo.adapters.formats.peft import WEIGHTS
from rpo.adapters.formats.verify import load_file
from rpo.adapters.lora_file import file_of
from rpo.models.checkpoint import Checkpoint


def of_pipeline(model: Checkpoint, folder: Path, rank: int) -> tuple[Layers, float]:
    """The LoRA that comes nearest to the denoiser of another pipeline, and its error."""
    part = model.family.denoiser
    tuned = type(model.denoiser).from_pretrained(folder, subfolder=part)
    beside = _squares_beside(model.denoiser, tuned)
    return nearest(_of_networks(model.denoiser, tuned, part), rank, beside=beside)


def of_dora(model: Checkpoint, place: Path, rank: int) -> tuple[Layers, float]:
    """The LoRA that comes nearest to a DoRA, which must be of diffusers' or peft's dialect, and its error."""
    file, networks = file_of(place), {model.family.denoiser: model.denoiser, **model.text_encoders}
    if file.name == WEIGHTS:
        PeftModel.from_pretrained(model.denoiser, str(file.parent))
    else:
        load_file(model.pipe, file)
    found = nearest(chain.from_iterable(_of_adapters(one, part) for part, one in networks.items()), rank)
    model.pipe.unload_lora_weights()
    return found


def of_layers(layers: Layers) -> Iterator[Change]:
    """What a LoRA changes."""
    for name, (down, up) in layers.items():
        yield name, (up.flatten(1).float() @ down.flatten(1).float()).unflatten(1, down.shape[1:])


def _of_adapters(network: nn.Module, part: str) -> Iterator[Change]:
    """What the adapters of a network change, merged into a copy of each layer."""
    layers: list[tuple[str, Any]] = [one for one in network.named_modules() if isinstance(one[1], LoraLayer)]
    for name, layer in layers:
        merged = copy.deepcopy(layer)
        merged.merge()
        change = merged.get_base_layer().weight - layer.get_base_layer().weight
        yield f"{part}.{canonical(name)}", change.detach()


def _of_networks(base: nn.Module, tuned: nn.Module, part: str) -> Iterator[Change]:
    """How the layers of one network differ from those of another."""
    before = dict(base.named_parameters())
    for name, layer in tuned.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            change = layer.weight.detach().float() - before[f"{name}.weight"].detach().float()
            if change.any():
                yield f"{part}.{name}", change


def _squares_beside(base: nn.Module, tuned: nn.Module) -> float:
    """The sum of squares of what differs in no weight of a layer: norms, biases, tables."""
    layers = (nn.Linear, nn.Conv2d)
    own = {f"{name}.weight" for name, layer in tuned.named_modules() if isinstance(layer, layers)}
    before = dict(base.named_parameters())
    rest = [(one, before[name]) for name, one in tuned.named_parameters() if name not in own]
    return sum((one.detach().float() - was.detach().float()).square().sum().item() for one, was in rest)
