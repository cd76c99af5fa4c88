"""What a computation costs: its operations, and the most memory that it holds at once beside what was there before.

On fake tensors (`rpo.models.unloaded`) it computes nothing, and the numbers are those of the real sizes.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
FLOPS = flop_registry | {
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}
"""Those of torch's own counter, and of the CPU's kernels, which that leaves out. The counter itself follows modules by
hooks that keep tensors, as if nothing were recomputed."""


@dataclass(frozen=True)
class Footprint:
    """Of one computation."""

    flops: int
    """Multiplications and additions."""
    peak: int
    """Bytes."""


def footprint(compute: Callable[[], Any]) -> Footprint:
    """Run a computation, and count."""
    with PeakBytes() as counted:
        compute()
    return Footprint(counted.flops, counted.peak)


@final
class PeakBytes(TorchDispatchMode):
    """Inside, every storage that an operation makes counts until nothing holds it any more, and operations do."""

    def __init__(self) -> None:
        """Start at nothing."""
        super().__init__()
        self.held = self.peak = self.flops = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, and look at what it made."""
        given = {storage._cdata for storage in _storages((args, kwargs))}  # views of weights are not made here
        made = func(*args, **(kwargs or {}))
        if formula := FLOPS.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=made)
        for storage in _storages(made):
            if storage._cdata not in given and storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return made

    def _gone(self, known: int, size: int) -> None:
        self._known.discard(known)
        self.held -= size


def _storages(things: Any) -> list[UntypedStorage]:
    return [one.untyped_storage() for one in tree_leaves(things) if isinstance(one, Tensor)]
