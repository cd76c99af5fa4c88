"""The loss scale of fp16 training: as large as the gradients allow, so that small ones do not vanish to zero.

The rule is that of torch's GradScaler: halve on overflow, double after 2,000 updates without one. It is written out
because `fit` reads the gradient norm once per update anyway, and GradScaler would wait for the device a second time.
"""

START = 2.0**16
GROWTH_INTERVAL = 2000


class LossScale:
    """The factor on the loss before backward, divided out of the gradients after it; always 1 unless it is dynamic."""

    def __init__(self, is_dynamic: bool) -> None:
        """Start at torch's usual scale, or at 1 for good."""
        self.is_dynamic = is_dynamic
        self.value = START if is_dynamic else 1.0
        self.good_updates = 0

    @property
    def may_shrink(self) -> bool:
        """Whether an overflow can still be the scale's fault, rather than the loss's own."""
        return self.is_dynamic and self.value > 1.0

    def adjust(self, is_finite: bool) -> None:
        """Draw the consequence of one update."""
        if not self.is_dynamic:
            return
        self.good_updates = self.good_updates + 1 if is_finite else 0
        if not is_finite:
            self.value /= 2
        elif self.good_updates == GROWTH_INTERVAL:
            self.value *= 2
            self.good_updates = 0

    def state_dict(self) -> dict[str, float | int]:
        """The scale and its streak of good updates."""
        return {"value": self.value, "good_updates": self.good_updates}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Continue from `state_dict()`."""
        self.value, self.good_updates = float(state["value"]), int(state["good_updates"])
