"""The guard on both sides: stop before a preference trainer wins its margin by forgetting.

DPO only asks that the gap grows. When a run breaks, the errors of both sides climb together, the rejected one faster:
the loss falls and the implicit accuracy rises while images turn to noise. The number that shows it is a side's error
against the reference's. A chosen side above 1.5 is forgotten; a rejected side that is pushed out of all proportion
takes the sampler with it, the chosen side still in place. Objectives without a reference, and runs that do not start at
theirs, are held against their own first updates.
"""

from collections.abc import Mapping
from typing import Any, final

SMOOTHING = 0.9
"""Weight of the past in the running means; errors of one batch swing with the times it drew."""

START_TOLERANCE = 0.1
"""How far the first margin may be from 0, where the policy must still equal its reference; room for half-precision
rounding."""

OWN_START = 10
"""Updates whose mean stands in for the reference's error where nothing asks the reference, or it is elsewhere."""

MEANS = {
    "chosen": "from here on the policy forgets both sides; raise beta, lower the learning rate, or give sft_weight",
    "rejected": "the policy wins by wrecking what it must not draw, and its sampler with it; give "
    "objective.margin_cap, raise beta or lower the learning rate",
}
"""What it means that a side's error has risen, and what to do."""


@final
class ErrorGuard:
    """Says why training must end, or nothing; smooths over updates, and can be saved and resumed."""

    def __init__(
        self, *, chosen: float, rejected: float, starts_at_zero: bool = True, starts_at_reference: bool = True
    ):
        """Start with nothing seen.

        Args:
            chosen: Where the chosen side's smoothed error, in units of the reference's, ends training.
            rejected: The same of the rejected side.
            starts_at_zero: Whether the first margin must be 0, as it is with the whole reference in the objective.
            starts_at_reference: Whether the policy is its reference before the first update.
        """
        self._limits = {"chosen": chosen, "rejected": rejected}
        self._starts_at_zero = starts_at_zero and starts_at_reference
        self._starts_at_reference = starts_at_reference
        self._own_start = dict.fromkeys(self._limits, 0.0)
        self._ratio = dict.fromkeys(self._limits, 1.0)
        self._seen = 0

    def __call__(self, metrics: dict[str, float]) -> str | None:
        """Look at the metrics of one update."""
        self._seen += 1
        if self._starts_at_zero and self._seen == 1 and abs(metrics["dpo/margin"]) > START_TOLERANCE:
            return (
                f"the first margin is {metrics['dpo/margin']:.3g}, but before the first update the policy must equal "
                "its reference (margin 0, loss log 2); was the adapter trained before, or does it have dropout?"
            )
        answers = [self._look_at(side, metrics) for side in self._limits]
        return next((answer for answer in answers if answer), None)

    def _look_at(self, side: str, metrics: dict[str, float]) -> str | None:
        # Of the update's means, not the mean of its micro-batches' ratios: the same however the update is split.
        ratio = metrics[f"dpo/{side}_error"] / self._baseline(side, metrics)
        self._ratio[side] = SMOOTHING * self._ratio[side] + (1 - SMOOTHING) * ratio
        if self._ratio[side] <= self._limits[side]:
            return None
        other = "the reference's" if self._has_baseline(side, metrics) else "that of the first updates"
        return (
            f"the {side} side's error has risen to {self._ratio[side]:.2f} times {other} (limit "
            f"{self._limits[side]:g}): {MEANS[side]}, and train anew"
        )

    def _has_baseline(self, side: str, metrics: dict[str, float]) -> bool:
        return self._starts_at_reference and f"dpo/reference_{side}_error" in metrics

    def _baseline(self, side: str, metrics: dict[str, float]) -> float:
        if self._has_baseline(side, metrics):
            return metrics[f"dpo/reference_{side}_error"]
        if self._seen <= OWN_START:
            self._own_start[side] += (metrics[f"dpo/{side}_error"] - self._own_start[side]) / self._seen
        return self._own_start[side]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"seen": self._seen, "ratio": dict(self._ratio), "own_start": dict(self._own_start)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self._seen = state_dict["seen"]
        self._ratio, self._own_start = dict(state_dict["ratio"]), dict(state_dict["own_start"])
