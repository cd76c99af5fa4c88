"""The global random generators of this process: read them, set them, keep them from being disturbed.

rpo draws its own noise from explicit generators; dropout and a caller's own code may use the global ones, and a resumed
run has to find those where it left them.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of python's, numpy's, torch's and the device's generator, as tensors, numbers and tuples."""
    numpy_state: Any = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": {
            "keys": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "position": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "device": _device_state(device),
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put the generators back to a `random_state`; a device other than the one it was read on keeps its own."""
    saved = state["numpy"]
    keys = saved["keys"].numpy().astype(np.uint32)
    random.setstate(state["python"])
    np.random.set_state(("MT19937", keys, saved["position"], saved["has_gauss"], saved["gauss"]))
    torch.set_rng_state(state["torch"])
    if device.type == "mps" and state["device"] is not None:
        torch.mps.set_rng_state(state["device"])
    elif device.type != "cpu" and state["device"] is not None:
        torch.get_device_module(device).set_rng_state(state["device"], device)


def seed_all(seed: int) -> None:
    """Seed python's, numpy's and torch's generators, those of every device included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def undisturbed_randomness(device: torch.device) -> Iterator[None]:
    """Whatever the block draws, the generators are afterwards where they were before it."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state, device)


def _device_state(device: torch.device) -> torch.Tensor | None:
    if device.type == "cpu":
        return None
    if device.type == "mps":
        return torch.mps.get_rng_state()
    return torch.get_device_module(device).get_rng_state(device)
