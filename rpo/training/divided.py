"""The tensors of a checkpoint that processes have parts of: each writes its own, and any number of them read the files.

Nobody ever holds a whole one. The files are safetensors, written by torch.distributed.checkpoint.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_with_path

from rpo.errors import InputError

PARTS = "divided"
"""The folder of a checkpoint in which they are."""


def apart(files: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, DTensor]]:
    """What a checkpoint's files hold, None for each tensor that is divided, and those by their places."""
    found: dict[str, DTensor] = {}

    def taken(path: tuple[Any, ...], value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        found["/".join(str(one.key if hasattr(one, "key") else one.idx) for one in path)] = value
        return None

    return tree_map_with_path(taken, dict(files)), found


def put_back(files: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Undo `apart`."""
    for place, tensor in tensors.items():
        *path, last = place.split("/")
        inside: Any = files
        for step in path:
            inside = inside[_key(inside, step)]
        inside[_key(inside, last)] = tensor


def write_parts(folder: Path, tensors: Mapping[str, DTensor]) -> None:
    """Write this process's parts; all of them take part, and all fail if one does."""
    writer, _ = _storage()
    try:
        save(dict(tensors), storage_writer=writer(str(folder), save_distributed=True))
    except CheckpointException as failed:
        process, (error, _) = next(iter(failed.failures.items()))
        if isinstance(error, OSError):
            raise error from failed
        raise RuntimeError(f"process {process} could not write its parts to {folder}: {error}") from failed


def stored(folder: Path) -> dict[str, Tensor]:
    """Tensors without memory like those that are written; none if nothing was divided."""
    if not folder.is_dir():
        return {}
    _, reader = _storage()
    found = reader(str(folder)).read_metadata().state_dict_metadata
    return {
        place: torch.empty(one.size, dtype=one.properties.dtype, device="meta")
        for place, one in sorted(found.items())
        if isinstance(one, TensorStorageMetadata)
    }


def read_parts(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Read what this process has of every tensor into it, however it is divided now, or all of it."""
    if into:
        _, reader = _storage()
        is_alone = not torch.distributed.is_initialized()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as it should be, alone
            load(dict(into), storage_reader=reader(str(folder)), no_dist=is_alone)


def _key(container: Any, step: str) -> Any:
    return step if isinstance(container, dict) and step in container else int(step)


def _storage() -> tuple[Any, Any]:
    try:
        from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
    except ImportError:
        raise InputError(
            "a checkpoint of weights that are divided is written by torch.distributed.checkpoint as safetensors, which "
            f"torch {torch.__version__} does not; update it (2.13 is tested), or give learning.sharding: none"
        ) from None
    return HuggingFaceStorageWriter, HuggingFaceStorageReader
