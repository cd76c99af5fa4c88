"""The weight of the trust region follows the distance that was measured, and survives a kill."""

import pytest

from rpo.trainers.rollouts.trust_region import TrustRegion


@pytest.mark.parametrize(("kl", "expected"), [(1.0, 3.0), (0.04, 2.0), (0.0, 4 / 3), (-1e-9, 4 / 3)])
def test_grows_after_a_long_update_and_shrinks_after_a_short_one(kl, expected):
    """The target is of √KL; a KL that rounding has made negative is none."""
    region = TrustRegion(0.2, coefficient=2.0)
    region.observe(kl)
    assert region.coefficient == pytest.approx(expected)


def test_settles_where_the_distance_is_the_target():
    """Of a policy whose √KL is 1/C, as that of a penalised update is."""
    region = TrustRegion(0.1)
    for _ in range(50):
        region.observe(region.coefficient**-2)
    assert 1 / region.coefficient == pytest.approx(0.1, rel=0.5)


def test_resumed_it_goes_on():
    region, resumed = TrustRegion(0.2), TrustRegion(0.2)
    region.observe(1.0)
    resumed.load_state_dict(region.state_dict())
    assert resumed.coefficient == region.coefficient != 1


def test_a_policy_that_has_diverged_is_told():
    with pytest.raises(ValueError, match="look for a policy that has diverged"):
        TrustRegion(0.2).observe(float("nan"))
