"""A LoRA, a DoRA or a whole fine-tune that lies on the disk, written as the files that other programs read."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from rpo.adapters.formats import FORMATS, changes, formats_for
from rpo.adapters.formats.layers import DORA, Layers
from rpo.adapters.formats.live import sizes_of
from rpo.adapters.formats.nearest import nearest
from rpo.adapters.formats.read import check_fits, read_lora
from rpo.adapters.formats.verify import load_layers
from rpo.adapters.formats.write import write_lora
from rpo.adapters.lora import verify_lora
from rpo.adapters.lora_file import file_of, tensors_of
from rpo.errors import InputError
from rpo.models.base import Family
from rpo.models.checkpoint import Checkpoint

ANY = "all"


@dataclass(frozen=True)
class ExportedLora:
    """What was written."""

    files: tuple[Path, ...]
    error: float | None
    """Of a LoRA that only comes near what was given, relative to it."""
    is_verified: bool
    """Whether the files were loaded back and compared with the model."""


def export(
    source: str | PathLike[str],
    *,
    kind: str | None = None,
    rank: int | None = None,
    base: str | PathLike[str] | None = None,
    output: str | PathLike[str] | None = None,
) -> ExportedLora:
    """Write the files of one format, of all, or by default of what programs of the family read.

    Args:
        source: A LoRA of any dialect, or a run's folder; with a base also a DoRA or a folder with a whole pipeline.
        kind: One of `FORMATS`, or "all".
        rank: Of the LoRA that is made of a DoRA or a pipeline, or of a LoRA of a higher rank.
        base: The checkpoint that it belongs to, against which the files are then verified.
        output: By default the folder `export` beside a file, or in a folder.
    """
    place = _in_run(Path(source))
    model = None if base is None else Checkpoint.load(base, allow_distilled=True)
    layers, family, error = _layers(place, model, rank)
    sizes = sizes_of(model.pipe, [family.denoiser]) if model else {}
    kinds = _kinds(kind, family)
    folder = Path(output) if output else (Path(source) if Path(source).is_dir() else place.parent) / "export"
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".exporting-", dir=folder))
    try:
        config = model.denoiser.config if model else {}
        files = write_lora(layers, staging, family, kinds, config=config, sizes=sizes)
        if model:
            load_layers(model.pipe, family, layers)
            verify_lora(model, staging)
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (staging / file).replace(folder / file)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return ExportedLora(tuple(folder / file for file in files), error, is_verified=model is not None)


def _in_run(place: Path) -> Path:
    return next((one for one in (place / "lora", place / "pipeline") if one.is_dir()), place)


def _kinds(kind: str | None, family: Family) -> Sequence[str]:
    if kind == ANY:
        return FORMATS if len(formats_for(family)) > 2 else formats_for(family)  # noqa: PLR2004 - names elsewhere
    return [kind] if kind else formats_for(family)


def _layers(place: Path, model: Checkpoint | None, rank: int | None) -> tuple[Layers, Family, float | None]:
    is_pipeline = (place / "model_index.json").is_file()
    is_dora = not is_pipeline and any(mark in name for name in tensors_of(file_of(place))[0] for mark in DORA)
    if (is_pipeline or is_dora) and (model is None or rank is None):
        raise InputError(
            f"{place} is {'a whole pipeline' if is_pipeline else 'a DoRA'}, of which a plain LoRA is made by comparing "
            "it with its base; expected the base and the rank of the LoRA: give --base MODEL --rank N"
        )
    if not (is_pipeline or is_dora):
        known = (model.family, model.denoiser.config) if model else (None, None)
        layers, family = read_lora(place, *known)
        if family is None:
            raise InputError(
                f"{place} has names that several families could have; expected the base, which says which: give --base "
                "MODEL"
            )
        if model:
            check_fits(layers, sizes_of(model.pipe, [family.denoiser, *model.text_encoders]), place, family.name)
        if rank is None:
            return layers, family, None
        lower, error = nearest(changes.of_layers(layers), rank)
        return lower, family, error
    assert model is not None and rank is not None
    near = changes.of_pipeline(model, place, rank) if is_pipeline else changes.of_dora(model, place, rank)
    return near[0], model.family, near[1]
