"""A LoRA in a folder: one file for each format, and for peft a folder, with those of text encoders in it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from rpo.adapters.formats import comfyui, diffusers, kohya, names_of, peft
from rpo.adapters.formats.layers import Layers, Sizes
from rpo.adapters.formats.names import Names
from rpo.adapters.lora_file import WEIGHT_FILE, put_in_order
from rpo.errors import InputError
from rpo.files.text import write_text
from rpo.models.base import Family

PEFT_FOLDER = "peft"
KOHYA_FILE, COMFYUI_FILE = "kohya_lora_weights.safetensors", "comfyui_lora_weights.safetensors"
PLACES = {"diffusers": WEIGHT_FILE, "peft": PEFT_FOLDER, "kohya": KOHYA_FILE, "comfyui": COMFYUI_FILE}
"""Where each format lies in the folder."""


def write_lora(
    layers: Layers,
    folder: Path,
    family: Family,
    formats: Sequence[str],
    *,
    config: Mapping[str, Any],
    sizes: Sizes,
) -> list[str]:
    """Write the files of these formats, and say which they are, the one of diffusers last.

    Args:
        config: Of the denoiser, as far as it is known.
        sizes: Of its layers, likewise.
    """
    strange = [name.partition(".")[0] for name in layers if not name.startswith(readable(family))]
    if strange:
        raise InputError(
            f"the LoRA adapts {strange[0]}, but {family.name} is loaded by nobody with a LoRA of that; expected layers "
            f"of {' or '.join(dict.fromkeys(readable(family)))[:-1]}: train those alone"
        )
    cpu = {name: (down.cpu(), up.cpu()) for name, (down, up) in layers.items()}
    names, files = names_of(family, config), list[str]()
    for one in sorted(formats, key=lambda one: one == "diffusers"):  # which says that all are there
        if one == "peft":
            files += _write_peft(cpu, folder, family, names)
        elif one == "diffusers":
            files += _write_file(folder, one, *diffusers.write(cpu, names.flat if names else ()))
        elif names is None:
            raise InputError(
                f"{family.name} has no names in the format {one}, for no program that reads it knows the family; "
                "expected diffusers or peft: give one of them"
            )
        else:
            dialect = kohya if one == "kohya" else comfyui
            files += _write_file(folder, one, *dialect.write(cpu, names, family.denoiser, sizes))
    return files


def readable(family: Family) -> tuple[str, ...]:
    """The beginnings of the names of layers that stock diffusers loads: of the denoiser and CLIP text encoders."""
    names = names_of(family, {})
    return tuple(f"{part}." for part in (family.denoiser, *(names.encoders if names else ())))


def _write_file(folder: Path, kind: str, tensors: Mapping[str, Tensor], header: dict[str, str]) -> list[str]:
    save_file(dict(tensors), folder / PLACES[kind], header)
    put_in_order(folder / PLACES[kind])
    return [PLACES[kind]]


def _write_peft(layers: Layers, folder: Path, family: Family, names: Names | None) -> list[str]:
    files: list[str] = []
    for part in dict.fromkeys(name.partition(".")[0] for name in layers):
        own = {name.partition(".")[2]: one for name, one in layers.items() if name.startswith(f"{part}.")}
        place = PEFT_FOLDER if part == family.denoiser else f"{PEFT_FOLDER}/{part}"
        tensors, settings = peft.write(own, is_flat=names is not None and part in names.flat)
        (folder / place).mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / place / peft.WEIGHTS, {"format": "pt"})
        put_in_order(folder / place / peft.WEIGHTS)
        write_text(folder / place / peft.SETTINGS, settings)
        files += [f"{place}/{peft.WEIGHTS}", f"{place}/{peft.SETTINGS}"]
    return files
