"""The denoiser divided among processes (FSDP2): each keeps its part of every block, and has all of it to compute.

For a base that does not fit one device. What a LoRA adds is not divided: it is whole on every process, so that its
gradient, its optimiser and its checkpoint are those of an undivided run. Autoencoder and text encoders stay whole.

Every forward is one that all processes make: one that made a forward more would wait for the others for ever.
"""

import os
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rpo.devices import gathered
from rpo.errors import InputError
from rpo.models.config import Sharding
from rpo.models.frozen import is_offloaded, is_quantized, stored_bytes


def is_sharded(network: nn.Module) -> bool:
    """Whether `shard` was done to it."""
    return "divided_over" in vars(network)


def refuse_settings(kind: Sharding, *, processes: int, frozen_base: str = "whole", is_compiled: bool = False) -> None:
    """Refuse what cannot be divided, as far as settings tell."""
    why = ""
    if kind != "none" and processes == 1:
        why = "there is one process; launch several (torchrun --nproc_per_node N), plan for --processes N, or give none"
    elif kind != "none" and frozen_base != "whole":
        why = f"model.frozen_base is {frozen_base}, and only whole weights can be divided; give one of both"
    elif kind != "none" and is_compiled:
        why = "the denoiser is compiled, which gathering its blocks would undo; give model.compile: false"
    elif kind == "hybrid" and not 1 < _on_this_machine() < processes:
        why = f"{_on_this_machine()} of {processes} processes are on this machine; give full, unless there are several"
        why += " machines with several processes each"
    if why:
        raise InputError(f"learning.sharding is {kind}, but {why}")


def refuse_network(kind: Sharding, network: Any, *, processes: int) -> None:
    """Refuse a network that cannot be divided."""
    few_bits = any(map(is_quantized, network.parameters()))
    compiled = any(module._compiled_call_impl is not None for module in network.modules())
    kept = "offload" if is_offloaded(network) else "quantised" if few_bits else "whole"
    refuse_settings(kind, processes=processes, frozen_base=kept, is_compiled=compiled)
    if not blocks_of(network):
        raise InputError(
            f"learning.sharding is {kind}, but {type(network).__name__} does not say which blocks it is made of "
            "(_no_split_modules); give none"
        )


def blocks_of(network: Any) -> list[nn.Module]:
    """The blocks that are gathered one at a time, an inner one after the one that it is in."""
    names = network._no_split_modules or ()
    return [module for module in network.modules() if type(module).__name__ in names]


def shard(network: Any, mesh: DeviceMesh, *, whole: Iterable[nn.Parameter] = ()) -> None:
    """Divide a network's parameters but those that stay `whole`, and have it compute on the mesh's devices.

    Block by block: a network on the CPU is never whole on the device.
    """
    ignored = set(whole)
    network.to(memory_format=torch.contiguous_format)  # others cannot be divided
    for module in (*reversed(blocks_of(network)), network):
        # What is outside of the blocks is let go, too, so that after a forward all is as it was before.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
    device = next(one.device for one in network.parameters() if isinstance(one, DTensor))
    for one in ignored:
        one.data = one.data.to(device)
    network.divided_over = mesh


def divided_like(network: Any, fresh: Any) -> None:
    """Divide a network without memory of its own as another one is, if that is, which it then takes the parts of."""
    if is_sharded(network):
        shard(fresh, network.divided_over)


def mesh_of(kind: Sharding, device: torch.device, processes: int) -> DeviceMesh:
    """Over all processes; of hybrid, copies on each machine of what is divided within it."""
    if kind == "full":
        return init_device_mesh(device.type, (processes,))
    own = _on_this_machine()
    return init_device_mesh(device.type, (processes // own, own), mesh_dim_names=("copy", "part"))


def whole_copy(network: Any, *, is_kept: bool) -> Any:
    """A network of all weights of a divided one, on the CPU; every process asks, and has it where it is to be kept."""
    state: dict[str, torch.Tensor] = {}
    for name, tensor in network.state_dict().items():
        whole = gathered(tensor)
        if is_kept:
            state[name] = whole.cpu()
    if not is_kept:
        return None
    with init_empty_weights(include_buffers=False):
        made = type(network).from_config(network.config)
    made.load_state_dict(state, assign=True)
    return made


def divided_bytes(network: Any, parts: int) -> int:
    """Bytes of one process's part, the block that computes and the one that is fetched meanwhile, both whole."""
    largest = max((stored_bytes(one) for one in blocks_of(network)), default=0)
    return -(-stored_bytes(network) // parts) + 2 * largest


def _on_this_machine() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
