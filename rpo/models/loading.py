"""From a source a person names to a pipeline of a known family, refused at the door when it is none or incomplete."""

import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError, safe_open

from rpo.errors import InputError
from rpo.models.base import Family
from rpo.models.config import FrozenBase
from rpo.models.distilled import refuse_distilled
from rpo.models.families import FAMILIES, family_named, family_of_file
from rpo.models.frozen import LIBRARY, quantization
from rpo.models.modular import is_modular_folder, load_modular, usual_class, usual_pipeline
from rpo.models.packaged import folder_of

SINGLE_FILE_SUFFIXES = (".safetensors", ".ckpt")

LOAD_ERRORS = (SafetensorError, SingleFileComponentError, OSError, RuntimeError, KeyError, ValueError)


def load_pipeline(
    source: str | PathLike[str] | DiffusionPipeline,
    *,
    dtype: torch.dtype = torch.float32,
    config: str | PathLike[str] | None = None,
    revision: str | None = None,
    variant: str | None = None,
    allow_distilled: bool = False,
    frozen_base: FrozenBase = "whole",
) -> Any:
    """Load a pipeline from a folder, a hub id, a single file, or take one as it is; see `Checkpoint.load`."""
    is_made = isinstance(source, DiffusionPipeline | ModularPipeline)
    if frozen_base in LIBRARY and (is_made or Path(folder_of(source)).is_file()):
        raise InputError(
            f"model.frozen_base is {frozen_base}, which is made while a folder is loaded, but the source is a single "
            "file or a pipeline; give a diffusers folder or hub id, or whole"
        )
    if isinstance(source, DiffusionPipeline | ModularPipeline):
        family_of(source := plain(source))
        return source
    source = folder_of(source)
    path = Path(source)
    if not allow_distilled:
        refuse_distilled(path.name)
    if path.is_file():
        return _load_single_file(path, dtype=dtype, config=config)
    if is_modular_folder(path):
        return _load_modular(path, dtype=dtype)
    if path.is_dir():
        family = check_folder(path, variant=variant)
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise InputError(f"'{source}' is neither a folder, a file nor a hub id; give a path that exists or owner/name")
    else:
        family = stated_family(source, revision)
    stated = DiffusionPipeline.load_config(source, revision=revision)
    few_bits = quantization(frozen_base, quantized_parts(family, stated), dtype)
    try:
        pipe = pipeline_class(family).from_pretrained(
            source, dtype=dtype, revision=revision, variant=variant, **family.load_options, **few_bits
        )
    except LOAD_ERRORS as error:
        raise InputError(f"'{source}' does not load as a {family.name} pipeline: {error}") from error
    check_nothing_missing(pipe, family, path)
    return pipe


def pipeline_class(family: Family) -> Any:
    """What diffusers loads a family by; refused where this version lacks it."""
    name = family.pipelines[0]
    if (made := getattr(diffusers, name, None)) is None:
        raise InputError(
            f"diffusers {diffusers.__version__} has no {name}, which {family.name} needs; expected a version that has "
            f"it: pip install -U diffusers; or, for a class of your own, diffusers.{name} = {name} before loading"
        )
    return made


def plain(pipe: Any) -> Any:
    """The usual pipeline of a modular one's components; any other as it is."""
    if not isinstance(pipe, ModularPipeline):
        return pipe
    family = _known("the pipeline", type(pipe).__name__)
    missing = [name for name in (*family.parts, "scheduler") if pipe.components.get(name) is None]
    if missing:
        raise InputError(
            f"the {type(pipe).__name__} has no {', '.join(missing)}; expected its components: call "
            "pipe.load_components(dtype=torch.bfloat16)"
        )
    return usual_pipeline(pipe, family.pipelines[0])


def _load_modular(folder: Path, *, dtype: torch.dtype) -> Any:
    try:
        return plain(load_modular(folder, dtype=dtype))
    except (*LOAD_ERRORS, AttributeError) as error:  # the last for a class that diffusers does not have
        raise InputError(f"'{folder}' does not load as a modular pipeline: {error}") from error


def quantized_parts(family: Family, stated: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and library of what is worth quantising: the denoiser, and text encoders larger than CLIP's."""
    names = [family.denoiser, *(name for name in family.text_encoders if "CLIP" not in str(stated[name][1]))]
    return [(name, stated[name][0]) for name in names if stated[name][0] is not None]


def _load_single_file(path: Path, *, dtype: torch.dtype, config: str | PathLike[str] | None) -> Any:
    if path.suffix not in SINGLE_FILE_SUFFIXES:
        raise InputError(f"'{path}' is a {path.suffix or 'nameless'} file, but a checkpoint is .safetensors or .ckpt")
    family = FAMILIES[0]
    if path.suffix == ".safetensors":
        check_safetensors(path)
        family = family_of_file(_announced_tensors(path))
    made = pipeline_class(family)
    if not hasattr(made, "from_single_file"):
        raise InputError(f"'{path}' is a single file of {family.name}, which diffusers does not read; give its folder")
    try:
        pipe = made.from_single_file(str(path), dtype=dtype, config=None if config is None else str(config))
    except NotImplementedError as error:  # torch's, on moving a network that did not get all of its tensors
        raise InputError(
            f"'{path}' lacks tensors of its denoiser or VAE; it is incomplete, or not of the architecture that "
            f"config={config} tells: get it again, or give the diffusers folder of its architecture"
        ) from error
    except LOAD_ERRORS as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"'{path}' does not load as a single-file {family.name} checkpoint: {reason}; if its architecture is not "
            "that of the family's first release, or there is no network, give config=<a diffusers folder of it>"
        ) from error
    for name in family.text_encoders:
        if pipe.components[name] is not None:
            named = pipe.components[name].named_parameters()
            _refuse_missing(path, [f"{name}.{one}" for one, tensor in named if tensor.is_meta])
    return pipe


def family_of(pipe: Any) -> Family:
    """The family of a pipeline; refused if it is none of those known, or lacks a component."""
    family = _known("the pipeline", type(pipe).__name__, is_itself=True)
    encoders = [name for name in family.text_encoders if name != "text_encoder_3"]  # T5 beside two others may be absent
    needed = (*family.parts, "scheduler", *encoders)
    missing = [name for name in needed if pipe.components[name] is None]
    if missing:
        raise InputError(f"the pipeline has no {', '.join(missing)}; load it with all of {', '.join(needed)}")
    return family


def _known(what: str, class_name: str, *, is_itself: bool = False) -> Family:
    """The family of a pipeline class, or of the text-to-image pipeline itself alone."""
    family = family_named(usual_class(class_name))
    if family is None or (is_itself and class_name != family.pipelines[0]):
        known = ", ".join(family.pipelines[0] for family in FAMILIES)
        is_pipeline = "Pipeline" in class_name
        remedy = "give the text-to-image checkpoint that it was made from, or add its family (docs/add_a_family.md)"
        raise InputError(
            f"{what} is a {class_name}, but a text-to-image pipeline is needed, one of {known}; "
            f"{remedy if is_pipeline else 'load one with from_pretrained(CHECKPOINT)'}"
        )
    return family


def stated_family(source: str | PathLike[str], revision: str | None = None) -> Family:
    """The family of a folder or repository, by its index alone."""
    return _known(f"'{source}'", _class_name(source, revision))


def _class_name(source: str | PathLike[str], revision: str | None = None) -> str:
    """What a folder's or repository's model_index.json says that it is."""
    try:
        return str(DiffusionPipeline.load_config(source, revision=revision)["_class_name"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"'{source}' has no readable model_index.json that names its class ({' '.join(str(error).split())[:300]}); "
            "expected a diffusers pipeline: copy or download it again"
        ) from error


def check_folder(folder: Path, *, variant: str | None = None) -> Family:
    """Refuse a diffusers folder with a missing component or truncated weights, before anything is loaded."""
    if not (folder / "model_index.json").is_file():
        raise InputError(f"'{folder}' has no model_index.json, so it is no diffusers pipeline; give that which has")
    family = _known(f"'{folder}'", _class_name(folder))
    stated = DiffusionPipeline.load_config(folder)
    names = [*family.parts, *family.text_encoders]
    weighted = [name for name in names if stated.get(name, [None])[0] is not None]
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in weighted if name in family.text_encoders]
    for component in (*weighted, *tokenizers, "scheduler"):
        if not (folder / component).is_dir():
            raise InputError(f"'{folder}' lacks its component {component}/; copy or download the whole of it again")
    stem = f".{variant}." if variant else "."
    for part in (folder / component for component in weighted):
        files = sorted(part.glob(f"*{stem}safetensors")) or sorted(part.glob(f"*{stem}bin"))
        if not files:
            raise InputError(f"'{part}' holds no weights (*{stem}safetensors); download it again")
        for file in files:
            if file.suffix == ".safetensors":
                check_safetensors(file)
    return family


def check_nothing_missing(pipe: Any, family: Family, folder: Path) -> None:
    """Refuse a pipeline some of whose tensors were not in its files: libraries only warn and take random weights."""
    for part in family.parts:
        _refuse_missing(
            folder / part, [name for name, tensor in pipe.components[part].named_parameters() if tensor.is_meta]
        )
    for part in family.text_encoders:
        files = list((folder / part).glob("*.safetensors"))
        if files and pipe.components[part] is not None:
            stored = {_bare(name) for file in files for name in _announced_tensors(file)}
            wanted = (name for name, _ in pipe.components[part].named_parameters())
            _refuse_missing(folder / part, [name for name in wanted if _bare(name) not in stored])


def _bare(name: str) -> str:
    """A tensor's name without the levels that files have and classes have not, or the reverse."""
    return ".".join(level for level in name.split(".") if level not in {"model", "text_model", "language_model"})


def _refuse_missing(part: Path, missing: list[str]) -> None:
    if missing:
        raise InputError(
            f"'{part}' lacks {len(missing)} tensor{'s' * (len(missing) > 1)}, among them {missing[0]}; its weights do "
            "not belong to its config.json, or are incomplete: get the checkpoint again"
        )


def check_safetensors(file: Path) -> None:
    """Refuse a safetensors file whose header is unreadable, or whose size is not what its header announces."""
    try:
        _announced_tensors(file)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"'{file}' ({file.stat().st_size} bytes) is no whole safetensors file ({error}); it is damaged or cut off, "
            "get it again"
        ) from error


def _announced_tensors(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())
