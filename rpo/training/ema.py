"""A running average of the parameters, ā ← d ā + (1 − d) p, kept in float32 beside them.

The decay warms up as min(decay, (1 + n) / (10 + n)) after n updates: without it a short run would still average in its
starting point.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rpo.devices import dealt


class ExponentialAverage:
    """The average of a fixed list of parameters over the updates so far."""

    def __init__(self, params: Sequence[nn.Parameter], decay: float) -> None:
        """Start the average at the parameters as they are; `decay` is the weight of the past once warmed up."""
        self.params: list[torch.Tensor] = list(params)
        self.decay, self.updates = decay, 0
        wide = [torch.promote_types(param.dtype, torch.float32) for param in params]
        self.averages = [param.detach().to(dtype, copy=True) for param, dtype in zip(params, wide, strict=True)]

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters as they are now into the average."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        now = [param.to(average.dtype) for param, average in zip(self.params, self.averages, strict=True)]
        torch._foreach_lerp_(self.averages, now, 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def copy_to_params(self) -> None:
        """Overwrite the parameters with their averages, for good."""
        for param, average in zip(self.params, self.averages, strict=True):
            param.copy_(average)

    def state_dict(self) -> dict[str, Any]:
        """The averages and how many updates they have seen."""
        return {"updates": self.updates, "averages": self.averages}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()` of an average over the same parameters."""
        self.updates = state["updates"]
        for average, value in zip(self.averages, state["averages"], strict=True):
            average.copy_(dealt(value, average))
