"""What was written, loaded again as people will load it: by stock diffusers, by peft, and else by rpo's own tables."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffusers.utils import logging
from peft import PeftModel

from rpo.adapters.formats import loads_kohya
from rpo.adapters.formats.layers import Layers
from rpo.adapters.formats.peft import SETTINGS
from rpo.adapters.formats.read import read_lora
from rpo.adapters.formats.write import PEFT_FOLDER, PLACES, write_lora
from rpo.adapters.lora_file import tensors_of
from rpo.models.base import Family


def formats_in(folder: Path) -> list[str]:
    """The formats that a folder holds a LoRA in."""
    return [name for name, place in PLACES.items() if (folder / place).exists()]


@contextmanager
def loaded(pipe: Any, family: Family, folder: Path, kind: str) -> Iterator[None]:
    """Inside, a plain pipeline has the LoRA of a folder, read from one of its formats."""
    if kind == "peft":
        with _by_peft(pipe, family, folder / PEFT_FOLDER):
            yield
        return
    config = pipe.components[family.denoiser].config
    try:
        is_stock = kind == "kohya" and loads_kohya(family, config) and not _adapts_encoders(folder / PLACES[kind])
        if kind == "diffusers" or is_stock:
            load_file(pipe, folder / PLACES[kind])
        else:
            load_layers(pipe, family, read_lora(folder / PLACES[kind], family, config)[0])
        yield
    finally:
        pipe.unload_lora_weights()


def _adapts_encoders(file: Path) -> bool:
    """Whether it has text encoders, whose layers diffusers before 0.42 does not find by kohya's names."""
    return any(name.startswith("lora_te") for name in tensors_of(file)[0])


def load_layers(pipe: Any, family: Family, layers: Layers, *, name: str | None = None) -> None:
    """Load layers into a pipeline by way of diffusers' file, whose note of ranks every version reads alike."""
    with TemporaryDirectory() as place:
        write_lora(layers, Path(place), family, ["diffusers"], config={}, sizes={})
        load_file(pipe, Path(place) / PLACES["diffusers"], name=name)


def load_file(pipe: Any, file: Path, *, name: str | None = None) -> None:
    """Load a file by stock diffusers, without the warning that a LoRA of the denoiser alone has no other part."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    finally:
        logging.set_verbosity(level)


@contextmanager
def _by_peft(pipe: Any, family: Family, folder: Path) -> Iterator[None]:
    places = {family.denoiser: folder, **{one.parent.name: one.parent for one in folder.glob(f"*/{SETTINGS}")}}
    there = {part: place for part, place in places.items() if (place / SETTINGS).is_file()}
    wrapped = [PeftModel.from_pretrained(pipe.components[part], place) for part, place in there.items()]
    try:
        yield
    finally:
        for one in wrapped:
            one.unload()
