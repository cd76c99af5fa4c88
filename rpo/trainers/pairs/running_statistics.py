"""Running mean and standard deviation, per bin, of numbers that training sees.

What an update reads are the moments of earlier updates alone, and what it sees is summed over micro-batches and
processes before it counts. So nothing depends on how an update is split, every process has the same bits, and with the
state in the checkpoint a resumed run has them too.
"""

from collections.abc import Mapping
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rpo.training.processes import Processes

_PRIOR = 16.0
"""Samples of the variance over all bins that stand behind each bin's own, so that a rare bin is not taken at its
word."""


@final
class RunningStatistics:
    """Decaying count, sum and sum of squares, per bin."""

    def __init__(self, bins: int, *, decay: float, device: torch.device):
        """Start with nothing seen.

        Args:
            decay: Weight of the past, per update; 0.99 looks back a hundred updates.
        """
        self._bins, self._decay = bins, decay
        self._moments = torch.zeros(3, bins, device=device)
        self._pending = torch.zeros(3, bins, device=device)

    def fresh(self) -> "RunningStatistics":
        """Others that have seen nothing."""
        return RunningStatistics(self._bins, decay=self._decay, device=self._moments.device)

    @torch.no_grad()
    def observe(self, values: Float[Tensor, " batch"], bins: Int[Tensor, " batch"]) -> None:
        """See the numbers of a micro-batch; they count from the next update on."""
        values = values.float()
        member = torch.nn.functional.one_hot(bins, self._bins).to(values.dtype)
        # A product with a 0/1 matrix and no scatter: on a GPU that would add in another order every time.
        self._pending += torch.stack([torch.ones_like(values), values, values**2]) @ member

    @torch.no_grad()
    def advance(self, processes: Processes) -> None:
        """Take in what all processes saw since the last call; once per update, on every process."""
        processes.average(self._pending)
        self._moments = self._decay * self._moments + processes.count * self._pending
        self._pending.zero_()

    def mean(self) -> Float[Tensor, ""]:
        """Mean over all bins together; 0 before anything was seen."""
        count, total, _ = self._moments.sum(dim=1)
        return total / count.clamp(min=torch.finfo(count.dtype).tiny)

    def relative_std(self) -> Float[Tensor, " bins"]:
        """Standard deviation of each bin by the mean of them all; 1 before anything was seen."""
        count, total, squares = self._moments
        everything = self._moments.sum(dim=1)
        seen = everything[0] > 0
        number = torch.where(seen, everything[0], 1.0)
        pooled = torch.where(seen, everything[2] / number - (everything[1] / number) ** 2, 1.0)
        own = squares - total**2 / torch.where(count > 0, count, 1.0)  # sum of squares about the bin's own mean
        std = ((own.clamp(min=0) + _PRIOR * pooled) / (count + _PRIOR)).clamp(min=0).sqrt()
        mean = std.mean()
        return torch.where(mean > 0, std / torch.where(mean > 0, mean, 1.0), 1.0)

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs."""
        return {"moments": self._moments.cpu()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Continue from a saved state."""
        self._moments = state_dict["moments"].to(self._moments.device)
        self._pending.zero_()
