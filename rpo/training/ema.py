"""A running average of the parameters, ā ← d ā + (1 − d) p, kept in float32 beside them.

The decay warms up as min(decay, (1 + n) / (10 + n)) after n updates: without it a short run would still average in its
starting point.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class ExponentialAverage:
    """The average of a fixed list of parameters over the updates so far."""

    def __init__(self, params: Sequence[nn.Parameter], decay: float) -> None:
        """Start the average at the parameters as they are.

        Args:
            params: What is averaged; the average starts as a copy of it.
            decay: Weight of the past once warmed up, in (0, 1); 0.99 for hundreds of updates, 0.9999 for thousands.
        """
        self.params = list(params)
        self.decay = decay
        self.updates = 0
        self.averages = [
            param.detach().to(torch.promote_types(param.dtype, torch.float32), copy=True) for param in self.params
        ]

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters as they are now into the average."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.averages, [param.to(average.dtype) for param, average in self._pairs()], 1 - decay)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Have the averages in the parameters inside the block, and the parameters as they were after it.

        What is put back is a clone: a view would alias the live weights and give the averages back in their place.
        """
        kept = [param.detach().clone() for param in self.params]
        try:
            self.copy_to_params()
            yield
        finally:
            with torch.no_grad():
                for param, value in zip(self.params, kept, strict=True):
                    param.copy_(value)

    @torch.no_grad()
    def copy_to_params(self) -> None:
        """Overwrite the parameters with their averages, for good."""
        for param, average in self._pairs():
            param.copy_(average)

    def state_dict(self) -> dict[str, Any]:
        """The averages and how many updates they have seen."""
        return {"updates": self.updates, "averages": self.averages}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()` of an average over the same parameters."""
        self.updates = state["updates"]
        for average, value in zip(self.averages, state["averages"], strict=True):
            average.copy_(value)

    def _pairs(self) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        return zip(self.params, self.averages, strict=True)
