"""Two control problems with nothing in common but their form: the default one, and one with other signs and weights."""

import pytest

from examples.continuous_control.lq import LinearPolicy, LinearQuadratic

DEFAULT = LinearQuadratic()
OTHER = LinearQuadratic(
    drift_state=-0.5,
    drift_action=0.8,
    noise_state=0.1,
    noise_action=-0.2,
    cost_state=1.5,
    cost_cross=0.3,
    cost_action=0.8,
    cost_state_linear=0.6,
    cost_action_linear=0.4,
    discount=1.4,
    entropy_weight=0.2,
    start_mean=-0.5,
    start_std=1.0,
)
PROBLEMS = (DEFAULT, OTHER)
POLICIES = (LinearPolicy.of(-0.3, 0.2, 0.3), LinearPolicy.of(0.25, -0.4, 0.15))
"""Far from the optimum, one per problem."""
IDS = ("default", "other")

CASES = pytest.mark.parametrize(("problem", "policy"), list(zip(PROBLEMS, POLICIES, strict=True)), ids=IDS)
