"""The old policy: a copy of what is trained that follows it slowly, and takes its place when it is asked.

A copy of the adapter, never of the base. It changes places with the policy's own weights, so that nothing is copied and
no second network is there.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from rpo.errors import InputError
from rpo.objectives.endpoint.update import LagConfig


@final
class OldPolicy:
    """Follows a fixed list of parameters; starts where they are, and can be saved and resumed.

    Attributes:
        updates: How many it has followed.
    """

    def __init__(self, params: Sequence[nn.Parameter], lag: LagConfig):
        """Start at the parameters as they are."""
        if any(isinstance(param, DTensor) for param in params):
            raise InputError(
                "all weights are trained, and learning.sharding divides them, but the objective keeps an old policy, "
                "which changes places with undivided ones; give adapter.train: lora, or learning.sharding: none"
            )
        self._params, self._lag, self.updates = list(params), lag, 0
        self._copies = [param.detach().clone() for param in params]

    @torch.no_grad()
    def follow(self) -> None:
        """Take the policy in after an update."""
        self.updates += 1
        torch._foreach_lerp_(self._copies, [param.data for param in self._params], 1 - self._lag.at(self.updates))

    @property
    def differs(self) -> bool:
        """Whether any of its weights is another than the policy's."""
        return any(not torch.equal(*both) for both in zip(self._copies, self._params, strict=True))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the policy is the old one, without gradient. Outside, it is as it was, errors or not."""
        self._exchange()
        try:
            with torch.no_grad():
                yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for place, param in enumerate(self._params):
            param.data, self._copies[place] = self._copies[place], param.data

    def state_dict(self) -> dict[str, Any]:
        """The copies, and how many updates they followed."""
        return {"copies": self._copies, "updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.updates = state_dict["updates"]
        torch._foreach_copy_(self._copies, state_dict["copies"])
