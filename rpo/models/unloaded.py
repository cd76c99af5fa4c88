"""A pipeline as its configurations describe it, without a weight: to be counted, and to run for its shapes alone.

Networks are built on the meta device, so that the largest take no memory. `pretend` puts fake tensors in their place:
operations on them check shapes and pick kernels as on a CPU, and compute nothing.
"""

from os import PathLike
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._pytree import tree_map_only

from rpo.errors import InputError
from rpo.models.base import Family
from rpo.models.loading import LOAD_ERRORS, pipeline_class, stated_family
from rpo.models.packaged import folder_of

DEPENDS_ON_CONTENT = (DataDependentOutputException, DynamicOutputShapeException)
"""What a computation raises on fake tensors that looks into them, as to leave padding out."""


def unloaded_pipeline(
    source: str | PathLike[str], *, dtype: torch.dtype, revision: str | None = None
) -> tuple[Any, Family]:
    """The pipeline of a diffusers folder or hub id on the meta device, and its family; only configurations are read."""
    place = folder_of(source)
    if Path(place).is_file():
        raise InputError(
            f"'{place}' is a single file, whose configurations are elsewhere; expected a diffusers folder or hub id: "
            "give that of its architecture, for its shapes are the same"
        )
    family = stated_family(place, revision)
    stated = DiffusionPipeline.load_config(place, revision=revision)
    given: dict[str, Any] = {}
    try:
        for name, value in stated.items():
            if isinstance(value, list) and len(value) == 2 and name not in family.load_options:  # noqa: PLR2004
                given[name] = None if value[0] is None else _part(place, name, *value, dtype=dtype, revision=revision)
            elif not name.startswith("_"):
                given[name] = value
        return pipeline_class(family)(**given | dict(family.load_options)), family
    except LOAD_ERRORS as error:
        raise InputError(f"'{place}' does not describe a {family.name} pipeline: {error}") from error


def _part(place: Any, name: str, library: str, kind: str, *, dtype: torch.dtype, revision: str | None) -> Any:
    cls: Any = getattr(diffusers if library == "diffusers" else transformers, kind)
    where = {"subfolder": name, "revision": revision}
    is_network, is_of_diffusers = issubclass(cls, nn.Module), issubclass(cls, diffusers.ModelMixin)
    if not is_network:
        return cls.from_pretrained(place, **where)
    config = cls.load_config(place, **where) if is_of_diffusers else cls.config_class.from_pretrained(place, **where)
    with torch.device("meta"):
        network = cls.from_config(config) if is_of_diffusers else cls(config)
    wide = tuple(getattr(cls, "_keep_in_fp32_modules", None) or ()) if is_of_diffusers else ()
    for one, tensor in network.named_parameters():
        if tensor.is_floating_point() and not any(word in one for word in wide):
            tensor.data = tensor.data.to(dtype)
    return network.requires_grad_(False).eval()


def pretend(network: nn.Module, mode: FakeTensorMode) -> None:
    """Put fake tensors of the CPU in the place of those of the meta device; what is trained stays so."""
    cpu = torch.device("cpu")
    for module in network.modules():
        for name, one in module._parameters.items():
            if one is not None:
                fake = FakeTensor(mode, one.data, cpu)
                module._parameters[name] = nn.Parameter(fake, requires_grad=one.requires_grad)
        for held in (module._buffers, vars(module)):  # where some classes keep tables, too
            for name, one in held.items():
                if isinstance(one, torch.Tensor | list | tuple):
                    held[name] = tree_map_only(torch.Tensor, lambda each: FakeTensor(mode, each.to("meta"), cpu), one)
