"""What a checkpoint is, wherever it lies: hashes of its networks, and the values that say what they mean."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from torch import Tensor, nn

from rpo.devices import gathered
from rpo.models.frozen import is_quantized, stored

SCHEDULE = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "rescale_betas_zero_snr",
    "set_alpha_to_one",
    "steps_offset",
    "timestep_spacing",
)
"""Of a scheduler's configuration: where the nodes lie and how much noise there is at each."""


def hash_network(network: nn.Module, config: Mapping[str, Any], extra: Mapping[str, Any]) -> str:
    """sha256 of weights, types and configuration; adapters do not count.

    Args:
        config: Its configuration; names with a leading underscore do not count.
    """
    described = {key: value for key, value in config.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps([described, extra], sort_keys=True, default=str).encode())
    for name, tensor in _base_tensors(network):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in stored(gathered(tensor)):
            digest.update(_bytes_of(part))
    return digest.hexdigest()


def hash_adapters(network: nn.Module) -> str:
    """sha256 of the adapters that a network carries, and of how strong each is; empty without any."""
    digest = hashlib.sha256()
    layers = [(name, vars(layer)) for name, layer in network.named_modules() if hasattr(layer, "base_layer")]
    for name, own in layers:
        digest.update(f"{name} {own.get('_active_adapter')} {own.get('scaling')}".encode())
    for name, tensor in network.state_dict().items() if layers else ():
        if ".lora_" in name:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_bytes_of(tensor))
    return digest.hexdigest() if layers else ""


def describe_schedule(config: Mapping[str, Any]) -> dict[str, str]:
    """The noise schedule that a scheduler's configuration makes, as text by name."""
    return {f"scheduler.{name}": str(config[name]) for name in SCHEDULE if config.get(name) is not None}


def is_of_checkpoint(network: nn.Module, name: str, part: str) -> bool | None:
    """Whether a network has the weights of the checkpoint that it says it comes from; adapters do not count.

    Returns:
        None where the checkpoint is neither on the disk nor in the Hub's cache: nothing is fetched.
    """
    files = list((Path(name) / part).glob("*.safetensors"))
    if not files and name.count("/") == 1 and not Path(name).exists():
        stems = (f"{part}/diffusion_pytorch_model{variant}.safetensors" for variant in ("", ".fp16"))
        cached = [try_to_load_from_cache(name, stem) for stem in stems]
        files = [Path(file) for file in cached if isinstance(file, str)]
    few_bits = {name.replace(".base_layer", "") for name, one in network.named_parameters() if is_quantized(one)}
    base = {name: tensor for name, tensor in _base_tensors(network) if name not in few_bits}
    found = [_has_weights_of(base, file) for file in files]
    return None if not found else any(found)


def _has_weights_of(base: Mapping[str, Tensor], file: Path) -> bool:
    """Whether all tensors of a file that the network has are the network's own; a shard has only some."""
    with safe_open(file, "pt") as opened:
        shared = [name for name in opened.keys() if name in base]  # noqa: SIM118, it is no dict
        return all(
            torch.equal(opened.get_tensor(name).to(base[name].dtype), gathered(base[name]).detach().cpu())
            for name in shared
        )


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _base_tensors(network: nn.Module) -> Iterable[tuple[str, Tensor]]:
    for name, tensor in network.state_dict().items():
        if ".lora_" not in name:
            yield name.replace(".base_layer", ""), tensor
