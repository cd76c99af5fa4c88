"""From a source a person names to a `StableDiffusionPipeline`, refused at the door when it is none or is incomplete."""

import json
import re
import struct
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError

from rpo.errors import InputError
from rpo.models.packaged import folder_of
from rpo.models.plain import refuse_altered

COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
WEIGHTED = ("unet", "vae", "text_encoder")
SINGLE_FILE_SUFFIXES = (".safetensors", ".ckpt")

OTHER_DENOISERS = {8: "an instruct-pix2pix UNet (an editor)", 9: "an inpainting UNet"}
"""UNets of the same shape but for their input channels, which need more than a prompt."""

SAME_PARTS = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
"""Pipelines of Stable Diffusion 1.x/2.x whose parts make a text-to-image pipeline."""


def load_pipeline(
    source: str | PathLike[str] | StableDiffusionPipeline,
    *,
    dtype: torch.dtype = torch.float32,
    config: str | PathLike[str] | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> StableDiffusionPipeline:
    """Load a Stable Diffusion pipeline from a folder, a hub id, a single file, or take one as it is.

    The safety checker is left out: training judges latents, and a blacked-out image is no sample of the model. It
    stays in the checkpoint itself, and in whatever pipeline the trained adapter is loaded into.

    Args:
        source: A pipeline object, folder, hub id ("owner/name"), single `.safetensors` / `.ckpt` file, or "shapes".
        dtype: Of all weights; given explicitly since libraries differ in what they do without.
        config: For a single file, the diffusers folder or hub id that tells its architecture.
    """
    if isinstance(source, DiffusionPipeline):
        check_pipeline(source)
        return source
    source = folder_of(source)
    path = Path(source)
    if path.is_file():
        return _load_single_file(path, dtype=dtype, config=config)
    if path.is_dir():
        check_folder(path, variant=variant)
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise InputError(f"'{source}' is neither a folder, a file nor a hub id; give a path that exists or owner/name")
    elif (class_name := _class_name(source, revision)) not in SAME_PARTS:
        refuse_family(f"'{source}'", class_name)
    try:
        pipe = StableDiffusionPipeline.from_pretrained(
            source,
            dtype=dtype,
            revision=revision,
            variant=variant,
            safety_checker=None,
            requires_safety_checker=False,
        )
    except (SafetensorError, OSError, RuntimeError, KeyError) as error:
        raise InputError(f"'{source}' does not load as a Stable Diffusion pipeline: {error}") from error
    check_nothing_missing(pipe, path)
    return pipe


def _load_single_file(path: Path, *, dtype: torch.dtype, config: str | PathLike[str] | None) -> StableDiffusionPipeline:
    if path.suffix not in SINGLE_FILE_SUFFIXES:
        raise InputError(f"'{path}' is a {path.suffix or 'nameless'} file, but a checkpoint is .safetensors or .ckpt")
    if path.suffix == ".safetensors":
        check_safetensors(path)
    try:
        pipe = StableDiffusionPipeline.from_single_file(
            str(path), dtype=dtype, config=None if config is None else str(config)
        )
    except NotImplementedError as error:  # torch's, on moving a network that did not get all of its tensors
        raise InputError(
            f"'{path}' lacks tensors of its UNet or VAE; it is incomplete, or not of the architecture that "
            f"config={config} tells: get it again, or give the diffusers folder of its architecture"
        ) from error
    except (SafetensorError, SingleFileComponentError, OSError, RuntimeError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"'{path}' does not load as a single-file Stable Diffusion checkpoint: {reason}; if its architecture is "
            "not SD 1.5's, or there is no network, give config=<a diffusers folder of the same architecture>"
        ) from error
    text_encoder = pipe.text_encoder.named_parameters()
    _refuse_missing(path, [f"text_encoder.{name}" for name, tensor in text_encoder if tensor.is_meta])
    return pipe


def check_pipeline(pipe: DiffusionPipeline) -> None:
    """Refuse a pipeline that is not Stable Diffusion 1.x/2.x text-to-image, or lacks a component."""
    if not isinstance(pipe, StableDiffusionPipeline):
        refuse_family("the pipeline", type(pipe).__name__)
    missing = [name for name in COMPONENTS if pipe.components[name] is None]
    if missing:
        raise InputError(f"the pipeline has no {', '.join(missing)}; load it with all of {', '.join(COMPONENTS)}")
    refuse_altered(pipe)
    config = pipe.unet.config
    if config["in_channels"] != pipe.vae.config["latent_channels"]:
        kind = OTHER_DENOISERS.get(config["in_channels"], "another kind of UNet")
        raise InputError(
            f"the UNet takes {config['in_channels']} channels: {kind}, but a text-to-image UNet takes "
            f"{pipe.vae.config['latent_channels']}; use the text-to-image checkpoint that it was made from"
        )
    for key, kind in (("addition_embed_type", "SDXL"), ("time_cond_proj_dim", "a guidance-distilled UNet (LCM)")):
        if config[key] is not None:
            raise InputError(f"the UNet has {key}={config[key]!r}: {kind}, but SD 1.x/2.x is needed; use its own base")


def refuse_family(what: str, class_name: str) -> None:
    """Say of a pipeline of another class which family it is, and what is supported."""
    family = re.split(r"Pipeline|Img2Img|Inpaint|ControlNet|Control(?=P)", class_name)[0] or class_name
    if "Pipeline" not in class_name:
        raise InputError(
            f"{what} is a {class_name}, but a Stable Diffusion 1.x/2.x text-to-image pipeline is needed; load one with "
            "StableDiffusionPipeline.from_pretrained(CHECKPOINT)"
        )
    if family == "StableDiffusion":
        advice = "the text-to-image checkpoint that it was made from, or load its parts with StableDiffusionPipeline"
    else:
        advice = "such a checkpoint; SDXL, SD 3, FLUX, PixArt, Sana and other families are not supported yet"
    raise InputError(
        f"{what} is a {class_name}, but Stable Diffusion 1.x/2.x text-to-image is needed; its family is {family}: give "
        f"{advice}"
    )


def _class_name(source: str | PathLike[str], revision: str | None = None) -> str:
    """What a folder's or repository's model_index.json says that it is."""
    try:
        found = DiffusionPipeline.load_config(source, revision=revision)
        return str(found["_class_name"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"'{source}' has no readable model_index.json that names its class ({' '.join(str(error).split())[:300]}); "
            "expected a diffusers pipeline: copy or download it again"
        ) from error


def check_folder(folder: Path, *, variant: str | None = None) -> None:
    """Refuse a diffusers folder with a missing component or truncated weights, before anything is loaded."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise InputError(
            f"'{folder}' has no model_index.json, so it is no diffusers pipeline; give the folder that holds it"
        )
    if (class_name := _class_name(folder)) not in SAME_PARTS:
        refuse_family(f"'{folder}'", class_name)
    for component in COMPONENTS:
        if not (folder / component).is_dir():
            raise InputError(
                f"'{folder}' lacks its component {component}/; copy or download the whole checkpoint again"
            )
    for component in WEIGHTED:
        stem = f".{variant}." if variant else "."
        files = sorted((folder / component).glob(f"*{stem}safetensors")) or sorted(
            (folder / component).glob(f"*{stem}bin")
        )
        if not files:
            raise InputError(f"'{folder / component}' holds no weights (*{stem}safetensors); download it again")
        for file in files:
            if file.suffix == ".safetensors":
                check_safetensors(file)


def check_nothing_missing(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Refuse a pipeline some of whose tensors were not in its files: libraries only warn and take random weights."""
    for part in ("unet", "vae"):
        _refuse_missing(
            folder / part, [name for name, tensor in pipe.components[part].named_parameters() if tensor.is_meta]
        )
    files = list((folder / "text_encoder").glob("*.safetensors"))
    if files:
        # Older files have one more level, text_model., than newer classes.
        stored = {name.removeprefix("text_model.") for file in files for name in _announced_tensors(file)}
        wanted = (name.removeprefix("text_model.") for name, _ in pipe.text_encoder.named_parameters())
        _refuse_missing(folder / "text_encoder", [name for name in wanted if name not in stored])


def _refuse_missing(part: Path, missing: list[str]) -> None:
    if missing:
        raise InputError(
            f"'{part}' lacks {len(missing)} tensor{'s' * (len(missing) > 1)}, among them {missing[0]}; its weights do "
            "not belong to its config.json, or are incomplete: get the checkpoint again"
        )


def check_safetensors(file: Path) -> None:
    """Refuse a safetensors file whose size is not what its header announces."""
    size = file.stat().st_size
    try:
        tensors = _announced_tensors(file)
        ends = [entry["data_offsets"][1] for entry in tensors.values()]
    except (ValueError, AttributeError, KeyError, TypeError, struct.error, MemoryError, OverflowError) as error:
        raise InputError(
            f"'{file}' ({size} bytes) has no readable safetensors header; it is damaged, get it again"
        ) from error
    with file.open("rb") as stream:
        announced = 8 + struct.unpack("<Q", stream.read(8))[0] + max(ends, default=0)
    if announced != size:
        raise InputError(
            f"'{file}' has {size} bytes, but its header announces {announced}; it is truncated, get it again"
        )


def _announced_tensors(file: Path) -> dict[str, dict[str, Any]]:
    with file.open("rb") as stream:
        header_size = struct.unpack("<Q", stream.read(8))[0]
        header = stream.read(min(header_size, file.stat().st_size))
    return {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
