"""What a checkpoint is, wherever it lies: hashes of its networks, and the values that say what they mean."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

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
        network: The network.
        config: Its configuration; names with a leading underscore do not count.
        extra: What else decides what it computes.
    """
    described = {key: value for key, value in config.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps([described, extra], sort_keys=True, default=str).encode())
    for name, tensor in _base_tensors(network):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe_schedule(config: Mapping[str, Any]) -> dict[str, str]:
    """The noise schedule that a scheduler's configuration makes, as text by name."""
    return {f"scheduler.{name}": str(config[name]) for name in SCHEDULE if config.get(name) is not None}


def _base_tensors(network: nn.Module) -> Iterable[tuple[str, Tensor]]:
    for name, tensor in network.state_dict().items():
        if ".lora_" not in name:
            yield name.replace(".base_layer", ""), tensor
