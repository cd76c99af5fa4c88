"""Where networks run, by the name that a configuration gives ("auto", "cpu", "cuda:1" …), and the way there."""

import os

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from rpo.errors import InputError


def device_named(name: str) -> torch.device:
    """The device of that name; "auto" is this process's GPU when there is one."""
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"device is {name!r}, which cannot be used here ({reason}); expected auto, cpu or a device that this "
            "machine and this build of torch have; give device: auto"
        ) from None
    return device


def uploaded(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device, on its way: from page-locked memory a GPU fetches it without draining its queue."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that processes have parts of, which all of them ask for; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that processes have parts of, not copied; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def dealt(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor that every process has the whole of, divided as another one is, if that is; a divided one as it is."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    there = tensor.to(like.device)
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)


def slow_type_note(device: torch.device, dtype: torch.dtype) -> str | None:
    """A warning where a processor computes in a type for which it has no units; None where all is well."""
    has_units = torch.cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16) or has_units:
        return None
    return (
        f"{str(dtype).removeprefix('torch.')} on this CPU is several times slower than float32 (it has no AMX); "
        "give float32 unless memory is short"
    )
