"""How the frozen base lies in memory: whole, in few bits, or in the CPU's memory but for the layer that computes.

Bits and hooks are diffusers' own. Adapters are added afterwards and stay what they are: float32, on the device. Parts
that are not asked for can wait on the CPU, and come for the one call that needs them.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from diffusers import PipelineQuantizationConfig
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from rpo.errors import InputError
from rpo.models.config import FrozenBase

LIBRARY = {"int8": "torchao", "nf4": "bitsandbytes"}
"""What quantises to so many bits."""

WAITING = torch.device("cpu")
"""Where parts are that are not asked for."""


def check_frozen_base(kind: FrozenBase, device: torch.device) -> None:
    """Refuse what cannot be done here, before any weight is read."""
    if kind in LIBRARY and find_spec(LIBRARY[kind]) is None:
        told = f"model.frozen_base is {kind}, but {LIBRARY[kind]} is not installed"
        raise InputError(f"{told}; pip install 'rpo[lowbit]', or give whole")
    if kind in ("nf4", "offload") and device.type == "cpu":
        raise InputError(f"model.frozen_base is {kind}, but the device is the CPU; expected a GPU: give int8 or whole")


def quantization(kind: FrozenBase, parts: Iterable[tuple[str, str]], dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is told of parts, each a name and the library of its class; `dtype` is of all else."""
    if kind not in LIBRARY:
        return {}
    if kind == "int8":
        cls, options = "TorchAoConfig", {"quant_type": import_module("torchao.quantization").Int8WeightOnlyConfig()}
    else:
        cls = "BitsAndBytesConfig"
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    mapping = {name: getattr(import_module(library), cls)(**options) for name, library in parts}
    return {"quantization_config": PipelineQuantizationConfig(quant_mapping=mapping)}


def is_quantized(tensor: Tensor) -> bool:
    """Whether a weight is kept in few bits."""
    is_wrapped = is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, DTensor)
    return is_wrapped or hasattr(tensor, "quant_state")


def stored(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a weight is made of; of most, itself."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return [inner for name in names for inner in stored(getattr(tensor, name))]
    state = getattr(tensor, "quant_state", None)
    return [tensor.detach()] if state is None else [tensor.detach(), state.absmax]


def stored_bytes(network: nn.Module) -> int:
    """Bytes of all weights as they lie in memory."""
    return sum(one.nbytes for tensor in network.parameters() for one in stored(tensor))


def planned_bytes(network: Any, kind: FrozenBase) -> int:
    """What `stored_bytes` of a network will be once it is quantised: a scale per row, or per 64 weights of 4 bits."""
    whole = stored_bytes(network)
    if kind not in LIBRARY:
        return whole
    kept = getattr(network, "get_output_embeddings", lambda: None)()
    wide = getattr(network, "_keep_in_fp32_modules", None) if kind == "nf4" else None  # which bitsandbytes leaves
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear) and layer is not kept and not set(name.split(".")) & set(wide or ()):
            count = layer.weight.numel()
            scales = layer.out_features * 5 if kind == "int8" else 4 * -(-count // 64)
            whole += scales + (count if kind == "int8" else -(-count // 2)) - layer.weight.nbytes
    return whole


def fetched_bytes(network: Any) -> int:
    """The most of an offloaded network that is on the device at once: a block that is recomputed."""
    names = network._no_split_modules or ()
    return max((stored_bytes(one) for one in network.modules() if type(one).__name__ in names), default=0)


def dtype_of(network: nn.Module) -> torch.dtype:
    """Of a network's weights that are not quantised."""
    return next(one.dtype for one in network.parameters() if one.is_floating_point())


def device_of(network: nn.Module) -> torch.device:
    """Where a network computes, which of an offloaded one is not where its weights lie."""
    return vars(network).get("computes_on") or next(network.parameters()).device


def quantized_like(network: nn.Module, fresh: nn.Module) -> list[str]:
    """Put fresh layers of 4 bits, with a network's weights, in the place of another's; the names of these layers."""
    found: list[str] = []
    for name, layer in network.named_modules():
        base: Any = getattr(layer, "base_layer", layer)
        if hasattr(getattr(base, "weight", None), "quant_state") and ".base_layer" not in name:
            options = {"compute_dtype": base.compute_dtype, "quant_type": base.weight.quant_type, "device": "meta"}
            made = type(base)(base.in_features, base.out_features, bias=base.bias is not None, **options)
            made.weight, made.bias = base.weight, base.bias
            fresh.set_submodule(name, made)
            found.append(name)
    return found


def offload(network: Any, device: torch.device) -> None:
    """Keep a network's layers on the CPU, and have each come to the device for its own computation.

    Done before an adapter is added, whose layers stay. Without streams: they fetch ahead in the order of a forward,
    which a backward that recomputes does not follow.
    """
    network.to("cpu")
    apply_group_offloading(network, onload_device=device, offload_type="leaf_level")
    network.computes_on = device


def is_offloaded(network: nn.Module) -> bool:
    """Whether `offload` was done to it, and no other hook of diffusers."""
    registries = (vars(module).get("_diffusers_hook") for module in network.modules())
    return "computes_on" in vars(network) and all(set(one.hooks) <= {"group_offloading"} for one in registries if one)


def recomputed(module: nn.Module, *args: Any) -> Any:
    """Gradient checkpointing that runs a block to its end: offloaded layers leave the device when they are done."""
    with set_checkpoint_early_stop(False):
        return checkpoint(module.__call__, *args, use_reentrant=False)


@contextmanager
def moved(networks: Iterable[Any], device: torch.device) -> Iterator[None]:
    """Inside, networks are on a device; those that were not go back to where they were, errors or not."""
    before = [(network, where) for network in networks if (where := device_of(network)) != device]
    try:
        for network, _ in before:
            network.to(device)
        yield
    finally:
        for network, where in before:
            network.to(where)
