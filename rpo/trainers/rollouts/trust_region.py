"""The weight of a trust region, which grows after too long an update and shrinks after too short a one."""

from typing import final

from rpo.objectives.policy_gradient import adapt_coefficient


@final
class TrustRegion:
    """The coefficient C of CPPO's penalty (arXiv:2305.18901), adapted from the distance that was measured.

    Attributes:
        coefficient: C, for the next update.
    """

    def __init__(self, target: float, *, coefficient: float = 1.0):
        """Start.

        Args:
            target: √KL wanted between the policy that drew a rollout and the one that leaves it.
        """
        self.target, self.coefficient = target, coefficient

    def observe(self, kl: float) -> None:
        """Adapt to the KL that the last update of a rollout started from."""
        self.coefficient = adapt_coefficient(self.coefficient, max(kl, 0.0) ** 0.5, target=self.target)

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Continue from a saved state."""
        self.coefficient = state_dict["coefficient"]
