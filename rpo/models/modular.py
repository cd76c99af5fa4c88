"""Modular pipelines of diffusers, taken by their components: the usual pipeline of the same family is made of them.

The components are shared, so that what is trained is trained on the modular pipeline, too. Families that exist only as
modular pipelines have no usual class, and are not known yet.
"""

from inspect import signature
from os import PathLike
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModularPipeline

INDEX = "modular_model_index.json"


def usual_class(name: str) -> str:
    """The name of the usual pipeline: FluxPipeline for FluxModularPipeline; any other as it is."""
    return name.replace("BaseModularPipeline", "Pipeline").replace("ModularPipeline", "Pipeline")


def is_modular_folder(folder: Path) -> bool:
    """Whether a folder has a modular pipeline, and no usual one."""
    return (folder / INDEX).is_file() and not (folder / DiffusionPipeline.config_name).is_file()


def load_modular(source: str | PathLike[str], *, dtype: torch.dtype, revision: str | None = None) -> ModularPipeline:
    """A modular pipeline with its components, from a folder or a hub id."""
    pipe = ModularPipeline.from_pretrained(str(source), revision=revision)
    pipe.load_components(dtype=dtype)
    return pipe


def usual_pipeline(pipe: Any, made: str) -> Any:
    """The pipeline of class `made` with the components and the options of a modular one; what it lacks is None."""
    usual = getattr(diffusers, made)
    needed, given = signature(usual.__init__).parameters, {**pipe.config, **pipe.components}
    parts = {name: given.get(name) for name, one in needed.items() if name in given or one.default is one.empty}
    parts.pop("self", None)
    found = usual(**parts)
    found.register_to_config(_name_or_path=pipe._pretrained_model_name_or_path)
    return found
