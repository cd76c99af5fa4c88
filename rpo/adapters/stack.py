"""Several LoRAs of one network as one: what rounds of training, each on top of the last, come to.

    W + B₁A₁ + B₂A₂ = W + [B₁ B₂] [A₁; A₂]

so the ranks add up and nothing is lost; a merge of B A back to a lower rank would. The strength alpha / rank of each is
taken into its B, so that the file has alpha = rank, the one value on which every program that loads LoRAs agrees.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rpo.adapters.lora_file import DOWN, UP, WEIGHT_FILE, inspect_lora, put_in_order
from rpo.errors import InputError
from rpo.files.whole import written_whole


def stack_loras(loras: Sequence[str | PathLike[str]], folder: str | PathLike[str]) -> Path:
    """Write one LoRA that does what several do together, each at full strength.

    Args:
        loras: Folders or files, of one network; a layer that some lack has the others' rank.
    """
    if not loras:
        raise InputError("got no LoRA to stack, but at least one is needed; give folders or files")
    downs: defaultdict[str, list[Tensor]] = defaultdict(list)
    ups: defaultdict[str, list[Tensor]] = defaultdict(list)
    first_of: dict[str, Path] = {}
    for lora in loras:
        found = inspect_lora(lora)
        for layer, (down, up) in _layers(found.path).items():
            strength = 1.0 if found.alpha is None else found.alpha / down.shape[0]
            downs[layer].append(down.float())
            ups[layer].append(up.float() * strength)
            first_of.setdefault(layer, found.path)
            _check_fits(layer, first_of[layer], found.path, (downs[layer], ups[layer]))
    state = {f"{layer}{DOWN[0]}": torch.cat(some).contiguous() for layer, some in downs.items()}
    state |= {f"{layer}{UP[0]}": torch.cat(some, dim=1).contiguous() for layer, some in ups.items()}
    place = Path(folder) / WEIGHT_FILE
    with written_whole(place) as partial:
        save_file(state, partial, metadata=_metadata(downs))
        put_in_order(partial)
    return place


def settings_of(ranks: Mapping[str, int]) -> dict[str, object]:
    """How peft describes an adapter of alpha = rank, by layer; those of another rank than most are told apart."""
    usual = max(ranks.values())
    pattern = {layer: rank for layer, rank in ranks.items() if rank != usual}
    values = {"r": usual, "lora_alpha": usual, "rank_pattern": pattern, "alpha_pattern": pattern}
    return values | {"target_modules": sorted(ranks), "lora_bias": False, "use_dora": False}


def factors_of(network: nn.Module, adapters: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every layer of a network that some adapters change, side by side as above, float32."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    layers: list[tuple[str, Any]] = [one for one in network.named_modules() if isinstance(one[1], LoraLayer)]
    for name, layer in layers:
        if own := [one for one in adapters if one in layer.lora_A]:
            downs = [layer.lora_A[one].weight.detach().float() for one in own]
            ups = [layer.lora_B[one].weight.detach().float() * layer.scaling[one] for one in own]
            found[name] = torch.cat(downs), torch.cat(ups, dim=1)
    return found


def _layers(file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """The two factors of each adapted layer, in the dialect of diffusers or of peft."""
    state = load_file(file)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for down_ending, up_ending in zip(DOWN[:2], UP[:2], strict=True):
        layers = [name.removesuffix(down_ending) for name in state if name.endswith(down_ending)]
        pairs |= {layer: (state[layer + down_ending], state[layer + up_ending]) for layer in layers}
    if not pairs:
        raise InputError(
            f"{file} is written in the dialect of another program; expected diffusers' names; load it into a pipeline "
            "and save it from there"
        )
    return pairs


def _check_fits(layer: str, first: Path, other: Path, factors: tuple[list[Tensor], list[Tensor]]) -> None:
    """Refuse two LoRAs that cannot be of one network, and layers that are no matrices."""
    downs, ups = factors
    if downs[-1].dim() != 2 or ups[-1].dim() != 2:  # noqa: PLR2004 - a matrix
        raise InputError(
            f"{other}: {layer} is adapted as a convolution; expected linear layers only; train with the attention "
            "projections as target_modules"
        )
    if downs[0].shape[1] != downs[-1].shape[1] or ups[0].shape[0] != ups[-1].shape[0]:
        raise InputError(
            f"{layer} maps {downs[0].shape[1]} to {ups[0].shape[0]} numbers in {first} and {downs[-1].shape[1]} to "
            f"{ups[-1].shape[0]} in {other}; expected LoRAs of one network; give those of one base"
        )


def _metadata(downs: Mapping[str, Sequence[Tensor]]) -> dict[str, str]:
    """What diffusers reads the rank and alpha from, for each network."""
    ranks = {layer: sum(len(down) for down in some) for layer, some in downs.items()}
    settings: dict[str, object] = {}
    for part in dict.fromkeys(layer.partition(".")[0] for layer in ranks):
        own = {layer.partition(".")[2]: rank for layer, rank in ranks.items() if layer.startswith(f"{part}.")}
        settings |= {f"{part}.{name}": value for name, value in settings_of(own).items()}
    return {"lora_adapter_metadata": json.dumps(settings, indent=2, sort_keys=True), "format": "pt"}
