"""Several LoRAs of one network as one: what rounds of training, each on top of the last, come to.

    W + B₁A₁ + B₂A₂ = W + [B₁ B₂] [A₁; A₂]

so the ranks add up and nothing is lost; a merge of B A back to a lower rank would. The strength alpha / rank of each is
taken into its B, so that the file has alpha = rank, the one value on which every program that loads LoRAs agrees.
"""

from collections import defaultdict
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from rpo.adapters.formats import names_of
from rpo.adapters.formats.diffusers import write
from rpo.adapters.formats.read import read_lora
from rpo.adapters.lora_file import WEIGHT_FILE, inspect_lora, put_in_order
from rpo.errors import InputError
from rpo.files.whole import written_whole


def stack_loras(loras: Sequence[str | PathLike[str]], folder: str | PathLike[str]) -> Path:
    """Write one LoRA that does what several do together, each at full strength.

    Args:
        loras: Folders or files, of one network and of whatever dialect; a layer that some lack has the others' rank.
    """
    if not loras:
        raise InputError("got no LoRA to stack, but at least one is needed; give folders or files")
    stacked: defaultdict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    first_of: dict[str, Path] = {}
    flat: set[str] = set()
    for lora in loras:
        found = inspect_lora(lora)
        read, family = read_lora(lora)
        flat |= names.flat if family and (names := names_of(family, {})) else set()
        for layer, (down, up) in read.items():
            stacked[layer].append((down.float(), up.float()))
            first_of.setdefault(layer, found.path)
            _check_fits(layer, first_of[layer], found.path, stacked[layer])
    layers = {
        layer: (torch.cat([down for down, _ in some]), torch.cat([up for _, up in some], dim=1))
        for layer, some in stacked.items()
    }
    place = Path(folder) / WEIGHT_FILE
    tensors, header = write(layers, flat)
    with written_whole(place) as partial:
        save_file(tensors, partial, header)
        put_in_order(partial)
    return place


def _check_fits(layer: str, first: Path, other: Path, factors: list[tuple[Tensor, Tensor]]) -> None:
    """Refuse two LoRAs that cannot be of one network, and layers that are no matrices."""
    (down, up), (down_too, up_too) = factors[0], factors[-1]
    if down_too.dim() != 2 or up_too.dim() != 2:  # noqa: PLR2004 - a matrix
        raise InputError(
            f"{other}: {layer} is adapted as a convolution; expected linear layers only; train with the attention "
            "projections as target_modules"
        )
    if down.shape[1] != down_too.shape[1] or up.shape[0] != up_too.shape[0]:
        raise InputError(
            f"{layer} maps {down.shape[1]} to {up.shape[0]} numbers in {first} and {down_too.shape[1]} to "
            f"{up_too.shape[0]} in {other}; expected LoRAs of one network; give those of one base"
        )
