"""A LoRA file of any dialect as layers of a family; which dialect it is, is told by the names of its tensors."""

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from rpo.adapters.formats import comfyui, diffusers, kohya, names_of, peft
from rpo.adapters.formats.layers import Layers, Sizes, Stored
from rpo.adapters.formats.names import Names
from rpo.adapters.lora_file import file_of, tensors_of
from rpo.errors import InputError
from rpo.models.base import Family
from rpo.models.families import FAMILIES

PARTS = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")


def read_lora(
    path: str | PathLike[str], family: Family | None = None, config: Mapping[str, Any] | None = None
) -> tuple[Layers, Family | None]:
    """The layers of a LoRA, with its strength taken in, and the family whose they are, if that can be told.

    Args:
        path: A file, or a folder of diffusers' or peft's.
        family: Whose it must be; by default that whose layers have such names.
        config: Of the denoiser, as far as it is known.
    """
    file = file_of(path)
    tensors, header = tensors_of(file)
    own = family or _family_by_names(tensors, file)
    layers, found = _read(tensors, header, file, own, names_of(own, config or {}) if own else None)
    for one in sorted(file.parent.glob(f"text_encoder*/{peft.WEIGHTS}")) if _is_peft(tensors, file) else ():
        layers |= peft.read(tensors_of(one)[0], one, one.parent.name)[0]
    if found.is_dora:
        raise InputError(
            f"{file} is a DoRA, whose strength is not in its two factors; expected a plain LoRA, or one made of it: "
            "rpo export FILE --base MODEL --rank N"
        )
    return layers, own


def dialect_of(tensors: Iterable[str], file: Path) -> str:
    """Which of the formats a file has."""
    names = list(tensors)
    if all(name.startswith(kohya.PREFIXES) for name in names):
        return "kohya"
    if _is_peft(names, file):
        return "peft"
    return "comfyui" if any(name.startswith(comfyui.PREFIX) for name in names) else "diffusers"


def _is_peft(tensors: Iterable[str], file: Path) -> bool:
    return file.name == peft.WEIGHTS or any(name.startswith(peft.PREFIX) for name in tensors)


def _read(
    tensors: Mapping[str, Tensor], header: Mapping[str, str], file: Path, family: Family | None, names: Names | None
) -> tuple[Layers, Stored]:
    dialect = dialect_of(tensors, file)
    if dialect == "peft":
        return peft.read(tensors, file, family.denoiser if family else "")
    if dialect == "diffusers":
        start = f"{family.denoiser}." if family else ""
        return diffusers.read(
            {one if one.startswith(PARTS) else start + one: value for one, value in tensors.items()}, header, file
        )
    if names is None or family is None:
        raise InputError(
            f"{file} has the names of {dialect}, in which {family.name if family else 'no family'} has none; expected "
            "those of diffusers or peft: give another file, or the checkpoint that it belongs to"
        )
    return (kohya if dialect == "kohya" else comfyui).read(tensors, names, family.denoiser, file)


def _family_by_names(tensors: Mapping[str, Tensor], file: Path) -> Family | None:
    """The first family that has a name for every layer; SDXL's UNet is that with several transformer blocks in one.

    Raises `InputError` if no family has the names of a dialect that needs one.
    """
    fitting: list[Family] = []
    faults: list[InputError] = []
    for family in FAMILIES:
        if (names := names_of(family, {})) is None:
            continue
        try:
            layers, _ = _read(tensors, {}, file, family, names)
        except InputError as error:
            faults.append(error)
            continue
        known = {one for several in names.originals.values() for one in several}
        own = {name.removeprefix(f"{family.denoiser}.") for name in layers if not name.startswith("text_encoder")}
        fitting += [family] if own <= known else []
    if not fitting and faults and dialect_of(tensors, file) in ("kohya", "comfyui"):
        raise faults[0]
    is_deep = any(mark in name for name in tensors for mark in ("transformer_blocks.1.", "transformer_blocks_1_"))
    is_large = is_deep or any(name.startswith(("text_encoder_2.", "lora_te2_")) for name in tensors)
    large = [family for family in fitting if family.pipelines[0] == "StableDiffusionXLPipeline"]
    return next(iter([*(large if is_large else []), *fitting]), None)


def check_fits(layers: Layers, sizes: Sizes, where: object, base: str) -> None:
    """Refuse a LoRA of another network: one with a layer that this lacks, or has in another size."""
    own = {name: (len(up), down.shape[1]) for name, (down, up) in layers.items()}
    wrong = [name for name, one in own.items() if name in sizes and one != sizes[name]]
    parts = " and ".join(sorted({name.partition(".")[0] for name in layers}))
    missing = [name for name in layers if name not in sizes]
    if wrong or missing:
        raise InputError(
            f"{where} adapts {len(layers)} layers of {parts}, of which this checkpoint has "
            f"{len(layers) - len(wrong) - len(missing)} in that size; expected a LoRA trained on {base}, which has no "
            f"{(missing + wrong)[0]} like it: give another file, or the checkpoint that it belongs to"
        )
