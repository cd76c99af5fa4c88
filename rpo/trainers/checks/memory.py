"""What an online run holds in memory beside its weights, measured on a small rollout and scaled up.

    images × (latents, predictions, prompts) + steps × (what is trained) + rows × (graph) + parameters × (optimiser)

The graph is measured as the tensors that a backward waits for; what kernels use for a moment comes on top.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass

import torch
from torch import Tensor, UntypedStorage

from rpo.devices import own_part

GRADIENT, AVERAGE = 4, 4
"""Bytes per trained parameter: float32 gradient, and the average where one is kept."""

KIB = 1024


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes, and what they are counted in."""

    image: float
    """Of the trajectory of one image."""
    images: int
    step: float
    """Of one trained step, laid out for training."""
    steps: int
    graph: float
    """Of the graph of one step."""
    rows: int
    """Steps whose graphs are in memory at once."""
    parameter: int
    parameters: int

    @property
    def total(self) -> float:
        """All of it."""
        return (
            self.image * self.images
            + self.step * self.steps
            + self.graph * self.rows
            + self.parameter * self.parameters
        )

    def __str__(self) -> str:
        """The sum with its formula."""
        return (
            f"{readable_bytes(self.total)} beside the weights = {self.images:,} images × {readable_bytes(self.image)} "
            f"+ {self.steps:,} steps × {readable_bytes(self.step)} + graphs of {self.rows:,} × "
            f"{readable_bytes(self.graph)} + {self.parameters:,} parameters × {self.parameter} B"
        )


class SavedBytes:
    """Counts what a graph keeps for its backward, each piece of memory once."""

    def __init__(self, parameters: Iterator[Tensor]):
        """Start at nothing."""
        self._known = {own_part(parameter).untyped_storage().data_ptr() for parameter in parameters}
        self._kept: dict[int, UntypedStorage] = {}

    @property
    def total(self) -> int:
        """What is there now: a block of a divided network is saved, and let go for as long as it does not compute."""
        return sum(storage.nbytes() for storage in self._kept.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._kept[storage.data_ptr()] = storage
        return tensor

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Inside, graphs are counted; count one before it is gone, since its memory may be used again."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield


def tensor_bytes(thing: object) -> int:
    """Bytes of all tensors in a dataclass or a mapping, counting what several share once for each."""
    if isinstance(thing, Tensor):
        return thing.numel() * thing.element_size()
    if isinstance(thing, Mapping):
        return sum(tensor_bytes(one) for one in thing.values())
    if is_dataclass(thing):
        return sum(tensor_bytes(getattr(thing, field.name)) for field in fields(thing))
    return 0


def free_bytes(device: torch.device) -> float | None:
    """What can still be had on a device; None where nobody can say."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def readable_bytes(count: float) -> str:
    """Bytes as people write them: `512 B`, `1.5 KiB`, `3.2 MiB`, `1.4 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < KIB:
            return f"{count:.3g} {unit}"
        count /= KIB
    return f"{count:.3g} GiB"
