"""A LoRA file as it lies on the disk: what it holds, and whether it can change anything.

`save_lora` proves a file against the live model that wrote it. This reads a file of whatever origin, without a base:
before it is published, and before it is loaded, where diffusers takes a file that changes nothing without a word.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rpo.adapters.formats.facts import DOWN, UP, alphas_of, part_of
from rpo.adapters.formats.layers import refuse_other_kinds
from rpo.adapters.formats.peft import WEIGHTS
from rpo.errors import InputError
from rpo.files.whole import written_whole

WEIGHT_FILE = "pytorch_lora_weights.safetensors"
"""The name that `load_lora_weights` looks for first."""


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA file holds."""

    path: Path
    sha256: str
    key: str
    """sha256 of names, tensors and metadata, in whatever order the file has them."""
    size_bytes: int
    num_parameters: int
    num_layers: int
    parts: tuple[str, ...]
    """Networks that it adapts: "unet", "text_encoder"."""
    ranks: tuple[int, ...]
    """The ranks that occur, in rising order; usually one."""
    alpha: float | None
    """The one alpha of all layers, if there is one."""
    is_portable: bool
    """Whether programs that know nothing of the metadata load it as strongly: alpha = rank, or beside each layer."""


def file_of(path: str | PathLike[str]) -> Path:
    """The file that a LoRA's path stands for: itself, or that of diffusers or of peft in a folder."""
    place = Path(path)
    if place.is_dir():
        place = next((one for name in (WEIGHT_FILE, WEIGHTS) if (one := place / name).is_file()), place)
    if not place.is_file():
        raise InputError(f"there is no LoRA at {path}; expected a .safetensors file or a folder with {WEIGHT_FILE}")
    return place


def tensors_of(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and what its header tells beside them."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{file} is not a complete safetensors file ({error}); save or download it again") from error


def inspect_lora(path: str | PathLike[str]) -> LoraFile:
    """Read a LoRA file and refuse one that is damaged, is no LoRA, or changes nothing."""
    file = file_of(path)
    tensors, metadata = tensors_of(file)
    downs = {name: tensor for name, tensor in tensors.items() if name.endswith(DOWN)}
    _check_tensors(file, tensors, downs)
    alphas = alphas_of(file, tensors, metadata)
    known = {alpha for alpha, _ in alphas}
    return LoraFile(
        path=file,
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        key=_content_hash(tensors, metadata),
        size_bytes=file.stat().st_size,
        num_parameters=sum(tensor.numel() for name, tensor in tensors.items() if name.endswith(DOWN + UP)),
        num_layers=len(downs),
        parts=tuple(sorted(set(map(part_of, downs)))),
        ranks=tuple(sorted({tensor.shape[0] for tensor in downs.values()})),
        alpha=known.pop() if len(known) == 1 else None,
        is_portable=all(is_told for _, is_told in alphas),
    )


def put_in_order(file: Path) -> None:
    """Rewrite a safetensors file with its metadata in one order, so that equal content is equal bytes.

    The library draws the order anew each time. The file also gets the mode of any other new file, not the library's.
    """
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")  # the length of the header, the header, the tensors
    header = json.loads(content[8:end])
    metadata = {"__metadata__": dict(sorted(header.pop("__metadata__", {}).items()))}
    text = json.dumps(metadata | header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # as the format wants it, for the tensors to be aligned
    with written_whole(file) as ordered:
        ordered.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def _content_hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_tensors(file: Path, tensors: Mapping[str, Tensor], downs: Mapping[str, Tensor]) -> None:
    refuse_other_kinds(tensors, file)
    ups = {name: tensor for name, tensor in tensors.items() if name.endswith(UP)}
    if not downs or len(ups) != len(downs):
        raise InputError(
            f"{file} has {len(downs)} down and {len(ups)} up factors among {len(tensors)} tensors, but a LoRA has "
            "as many of both and at least one; give a LoRA file, not another kind of checkpoint"
        )
    broken = [name for name, one in tensors.items() if one.is_floating_point() and not one.isfinite().all()]
    if broken:
        raise InputError(f"{file} holds numbers that are not finite, in {broken[0]}; go back to an earlier checkpoint")
    if not any(tensor.any() for tensor in ups.values()):
        raise InputError(
            f"{file} changes nothing: every up factor is zero, as before the first update; train before saving, or "
            "check that the trained parameters are those that were saved"
        )
