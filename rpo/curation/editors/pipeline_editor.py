"""One editor for every editing pipeline of diffusers; what differs between them is a `EditorFamily`.

Images of one size are edited together where the pipeline can, each with a generator of its own, so that an edit does
not depend on its neighbours; the result has the size of its source, whatever size the pipeline prefers to work at.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image, Resampling

from rpo.config.ranges import Count, NotNegative
from rpo.config.settings import settings
from rpo.curation.components import hash_of_files
from rpo.curation.curate_config import EditorConfig
from rpo.data.pixels import rgb
from rpo.devices import device_named
from rpo.errors import InputError
from rpo.publishing.licenses import license_of_base


@settings
class EditSettings:
    """How strongly and how long an edit is sampled; a family uses what its pipeline knows."""

    num_steps: Count
    guidance_scale: NotNegative
    image_guidance_scale: NotNegative = 1.0
    """InstructPix2Pix: how closely the source is kept."""
    conditioning_scale: NotNegative = 1.0
    """ControlNet: how strongly the source is felt."""
    max_area: Count = 1024 * 1024
    """Kontext: pixels that it works at."""


@dataclass(frozen=True)
class EditorFamily:
    """What one kind of editing pipeline differs in."""

    kind: str
    pipelines: tuple[str, ...]
    """Classes of diffusers that it may be."""
    licences: Mapping[str, str]
    """Licence of each known model's weights; the first one is what the kind is known for."""
    defaults: Callable[[DiffusionPipeline], EditSettings]
    """What its authors recommend for a pipeline."""
    arguments: Callable[[EditSettings, tuple[int, int]], dict[str, Any]]
    """What its pipeline is called with besides images, instructions, steps and generators; for images of a size."""
    is_one_by_one: bool = False
    """Whether its pipeline takes one edit at a time."""

    @property
    def model(self) -> str:
        """Hub id of the weights that it is known for."""
        return next(iter(self.licences))


@final
class PipelineEditor:
    """Edits images by a diffusers pipeline.

    Attributes:
        pipe: The pipeline.
    """

    concurrency: int = 1
    licence: str
    batch_size: int
    identity: Mapping[str, str]

    def __init__(
        self, pipe: DiffusionPipeline, family: EditorFamily, config: EditorConfig, *, folder: str | None = None
    ) -> None:
        """Take a pipeline that is loaded and where it shall run.

        Args:
            config: Its settings; what is None there is what the family recommends.
            folder: Where the weights came from, if that is not what the model is called.
        """
        self.pipe = pipe
        self._family = family
        self._settings = _settings(family, pipe, config)
        model = config.model or family.model
        self.batch_size = config.batch_size
        self.licence = licence_of(model, family.licences)
        self.identity = {
            "kind": family.kind,
            "model": model,
            "revision": revision_of(folder or model, pipe),
            "dtype": str(pipe.dtype),
            "pipeline": type(pipe).__name__,
            "scheduler": type(pipe.components["scheduler"]).__name__,
            **{name: str(value) for name, value in asdict(self._settings).items()},
        }
        if config.base_model:
            self.identity |= {"base_model": config.base_model, "base_revision": revision_of(config.base_model, pipe)}
        pipe.set_progress_bar_config(disable=True)

    def __call__(self, images: Sequence[Image], instructions: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        """Edit every image by its instruction.

        Args:
            seeds: One per image; the same seed, image and instruction give the same edit.

        Returns:
            RGB images, each of the size of its source.
        """
        edited: dict[int, Image] = {}
        for indices in _groups(images, is_one_by_one=self._family.is_one_by_one):
            noise = [torch.Generator().manual_seed(seeds[k]) for k in indices]
            edits = self._edit([rgb(images[k]) for k in indices], [instructions[k] for k in indices], noise)
            edited |= zip(indices, edits, strict=True)
        return [_fit(edited[index], image) for index, image in enumerate(images)]

    def _edit(self, images: list[Image], instructions: list[str], noise: list[torch.Generator]) -> Sequence[Image]:
        """Edit images of one size."""
        is_one = self._family.is_one_by_one
        pipe: Any = self.pipe
        return pipe(
            prompt=instructions[0] if is_one else instructions,
            image=images[0] if is_one else images,
            generator=noise[0] if is_one else noise,
            num_inference_steps=self._settings.num_steps,
            **self._family.arguments(self._settings, images[0].size),
        ).images


def _groups(images: Sequence[Image], *, is_one_by_one: bool) -> list[list[int]]:
    """Indices of the images that are edited together: those of each size, or each alone."""
    by_size: dict[object, list[int]] = {}
    for index, image in enumerate(images):
        by_size.setdefault(index if is_one_by_one else image.size, []).append(index)
    return list(by_size.values())


def _fit(edited: Image, source: Image) -> Image:
    edited = rgb(edited)
    return edited if edited.size == source.size else edited.resize(source.size, Resampling.LANCZOS)


def _settings(family: EditorFamily, pipe: DiffusionPipeline, config: EditorConfig) -> EditSettings:
    asked = {
        "num_steps": config.num_steps,
        "guidance_scale": config.guidance_scale,
        "image_guidance_scale": config.image_guidance_scale,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    if wrong := {name: value for name, value in given.items() if not value >= 1}:
        raise InputError(
            f"editor {family.kind}: {', '.join(f'{name} is {value}' for name, value in wrong.items())}, expected at "
            "least 1; leave it out for what the model recommends"
        )
    defaults = replace(family.defaults(pipe), conditioning_scale=config.conditioning_scale)
    return replace(defaults, **given)


def place(config: EditorConfig) -> tuple[torch.device, torch.dtype]:
    """Device and dtype that a configuration asks for; "auto" is the GPU and bfloat16 where there is one."""
    device = device_named(config.device)
    if config.dtype == "auto":
        return device, torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, getattr(torch, config.dtype)


def licence_of(model: str, known: Mapping[str, str]) -> str:
    """Licence of a model's weights: known, or as the model card in its folder says; empty if neither tells."""
    if model in known or not (found := license_of_base(model)):
        return known.get(model, "")
    return found.name or found.id


def revision_of(model: str, pipe: DiffusionPipeline) -> str:
    """The commit of a model from the Hub, or the sha256 of all files of a folder; empty if nothing tells.

    Args:
        pipe: What was loaded from it; its networks remember the snapshot they came from.
    """
    folder = Path(model)
    if not folder.is_dir():
        places = [str(part.config.get("_name_or_path", "")) for part in pipe.components.values() if _is_network(part)]
        name = model.replace("/", "--")
        commits = [re.search(rf"models--{re.escape(name)}/snapshots/(\w+)", one) for one in places]
        return next((found.group(1) for found in commits if found), "")
    return hash_of_files(folder)


def _is_network(part: object) -> bool:
    from diffusers import ModelMixin

    return isinstance(part, ModelMixin)
