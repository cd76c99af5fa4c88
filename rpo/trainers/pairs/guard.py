"""The guard on the chosen side: stop before a preference trainer wins its margin by forgetting.

DPO only asks that the gap grows. When a run breaks, the errors of both sides climb together, the rejected one faster:
the loss falls and the implicit accuracy rises while images turn to noise. The number that shows it is the chosen
side's error against the reference's. Objectives without a reference are held against their own first updates.
"""

from typing import final

SMOOTHING = 0.9
"""Weight of the past in the running means; errors of one batch swing with the times it drew."""

START_TOLERANCE = 0.1
"""How far the first margin may be from 0, where the policy must still equal its reference; room for half-precision
rounding."""

OWN_START = 10
"""Updates whose mean stands in for the reference's error where nothing asks the reference."""


@final
class ChosenGuard:
    """Says why training must end, or nothing; smooths over updates, and can be saved and resumed."""

    def __init__(self, max_ratio: float, *, starts_at_zero: bool = True):
        """Start where policy and reference are equal.

        Args:
            max_ratio: Where the smoothed chosen error, in units of the reference's, ends training.
            starts_at_zero: Whether the first margin must be 0, as it is with the whole reference in the objective.
        """
        self.max_ratio = max_ratio
        self._starts_at_zero = starts_at_zero
        self._own_start = 0.0
        self._ratio = 1.0
        self._seen = 0

    def __call__(self, metrics: dict[str, float]) -> str | None:
        """Look at the metrics of one update."""
        self._seen += 1
        if self._starts_at_zero and self._seen == 1 and abs(metrics["dpo/margin"]) > START_TOLERANCE:
            return (
                f"the first margin is {metrics['dpo/margin']:.3g}, but before the first update the policy must equal "
                "its reference (margin 0, loss log 2); was the adapter trained before, or does it have dropout?"
            )
        # Of the update's means, not the mean of its micro-batches' ratios: the same however the update is split.
        ratio = metrics["dpo/chosen_error"] / self._baseline(metrics)
        self._ratio = SMOOTHING * self._ratio + (1 - SMOOTHING) * ratio
        if self._ratio > self.max_ratio:
            other = "the reference's" if "dpo/reference_chosen_error" in metrics else "that of the first updates"
            return (
                f"the chosen side's error has risen to {self._ratio:.2f} times {other} (limit "
                f"{self.max_ratio:g}): from here on the policy forgets both sides; raise beta, lower the learning "
                "rate, or give sft_weight, and train anew"
            )
        return None

    def _baseline(self, metrics: dict[str, float]) -> float:
        if "dpo/reference_chosen_error" in metrics:
            return metrics["dpo/reference_chosen_error"]
        if self._seen <= OWN_START:
            self._own_start += (metrics["dpo/chosen_error"] - self._own_start) / self._seen
        return self._own_start

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"ratio": self._ratio, "seen": self._seen, "own_start": self._own_start}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Continue from a saved state."""
        self._ratio, self._seen = state_dict["ratio"], int(state_dict["seen"])
        self._own_start = state_dict.get("own_start", 0.0)  # runs that have a reference need none
