"""The learning rate as a pure function of the update's index: nothing to save, nothing that resuming could shift."""

import math
from typing import Literal

Schedule = Literal["constant", "cosine", "linear"]
"""What follows the warm-up: stay at the peak, or fall to zero at the last update."""


def learning_rate(
    update: int, *, peak: float, schedule: Schedule = "constant", warmup_updates: int = 0, updates: int
) -> float:
    """The learning rate of one update.

    The warm-up rises in equal parts and reaches `peak` in its last update, so that no update is spent at zero. The
    decays start from `peak` in the first update after it and would reach zero right after the last one.

    Returns:
        The rate, above 0 for every update below `updates`.
    """
    if update < warmup_updates:
        return peak * (update + 1) / warmup_updates
    progress = (update - warmup_updates) / max(1, updates - warmup_updates)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if schedule == "linear":
        return peak * max(0.0, 1 - progress)
    return peak
