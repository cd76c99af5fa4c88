"""AdamW, with float32 moments or with 8-bit ones, which are a quarter as large."""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn

from rpo.errors import InputError

OptimizerName = Literal["adamw", "adamw8bit"]

MOMENTS: dict[OptimizerName, int] = {"adamw": 8, "adamw8bit": 2}
"""Bytes of both moments, per trained parameter."""


def check_optimizer(name: OptimizerName) -> None:
    """Refuse what is not installed, before anything is done for a run."""
    if name == "adamw8bit" and find_spec("bitsandbytes") is None:
        told = "learning.optimizer is adamw8bit, but bitsandbytes is not installed"
        raise InputError(f"{told}; pip install 'rpo[lowbit]', or give adamw")


def make_optimizer(params: Sequence[nn.Parameter], name: OptimizerName, **options: Any) -> torch.optim.Optimizer:
    """The optimizer of that name; `options` are AdamW's."""
    check_optimizer(name)
    if name == "adamw8bit":  # tensors of less than 4096 numbers keep float32 moments there
        return import_module("bitsandbytes").optim.AdamW8bit(params, **options)
    is_cuda = params[0].device.type == "cuda"
    return torch.optim.AdamW(params, fused=is_cuda, foreach=not is_cuda, **options)
