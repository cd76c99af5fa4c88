from dataclasses import replace

import pytest
import torch

from rpo.control.lq import LinearPolicy, objective, optimal_policy
from rpo.control.policy_gradient import ControlConfig, cpg_loss, cppo_loss, learn
from rpo.control.rollouts import advantages, draw
from rpo.randomness import keyed_generator
from tests.control.problems import DEFAULT, POLICIES

SMALL = ControlConfig(updates=8, paths=200)
METHODS = pytest.mark.parametrize("method", ["cpg", "cppo_sqrt", "cppo_linear"])
START = LinearPolicy.of(0.0, 0.0, 1.0)


@pytest.fixture
def seen():
    return draw(
        DEFAULT,
        POLICIES[0],
        paths=300,
        actions_per_state=2,
        path_step=0.05,
        time_step=0.005,
        generator=keyed_generator("losses"),
    )


def gradient(loss, policy):
    return torch.autograd.grad(loss, policy.weights)[0]


@pytest.mark.parametrize("power", ["sqrt", "linear"])
def test_at_the_old_policy_both_methods_have_one_gradient(seen, power):
    old = POLICIES[0]
    policy = old.copy(is_trainable=True)
    advantage = advantages(DEFAULT, old, seen)
    plain = gradient(cpg_loss(DEFAULT, policy, seen, advantage), policy)
    ratio = gradient(cppo_loss(DEFAULT, policy, old, seen, advantage, coefficient=3.0, power=power), policy)
    assert torch.allclose(plain, ratio, atol=1e-12)


def test_the_penalty_is_that_of_the_distance_from_the_old_policy(seen):
    old, new = POLICIES[0], LinearPolicy.of(-0.2, 0.1, 0.4)
    advantage = advantages(DEFAULT, old, seen)
    kl = old.kl(new, seen.x)
    for power, distance in (("linear", kl.mean()), ("sqrt", kl.sqrt().mean())):
        with_penalty, less = (
            cppo_loss(DEFAULT, new, old, seen, advantage, coefficient=coefficient, power=power)
            for coefficient in (3.0, 1.0)
        )
        assert float(with_penalty - less) == pytest.approx(2 * float(distance), rel=1e-5)


@METHODS
def test_learning_improves_the_policy_and_reports_its_exact_value(method):
    updates = list(learn(DEFAULT, START, replace(SMALL, method=method)))
    assert len(updates) == SMALL.updates
    start, best = float(objective(DEFAULT, START)), float(objective(DEFAULT, optimal_policy(DEFAULT)))
    assert start + 0.2 * (best - start) < updates[-1].value <= best
    for update in updates:
        assert update.value == float(objective(DEFAULT, update.policy))
    assert START.weights.tolist() == [0, 0, 0]


@METHODS
def test_the_seed_is_all_the_randomness_there_is(method):
    config = replace(SMALL, method=method, updates=2)
    torch.manual_seed(1)
    first = list(learn(DEFAULT, START, config))
    state = torch.get_rng_state()
    torch.manual_seed(2)
    again = list(learn(DEFAULT, START, config))
    other = list(learn(DEFAULT, START, replace(config, seed=1)))
    assert torch.equal(first[-1].policy.weights, again[-1].policy.weights)
    assert not torch.equal(first[-1].policy.weights, other[-1].policy.weights)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@METHODS
def test_no_update_reaches_much_farther_than_asked(method):
    before = START.weights
    for update in learn(DEFAULT, START, replace(SMALL, method=method, reach=0.02)):
        assert (update.policy.weights - before).abs().max() < 0.03
        before = update.policy.weights


def test_a_coefficient_follows_the_distance_that_it_led_to():
    updates = list(learn(DEFAULT, START, replace(SMALL, method="cppo_linear", updates=30)))
    factors = set()
    for update, after in zip(updates, updates[1:], strict=False):
        too_far, too_near = update.sqrt_kl > 1.1 * update.target, update.sqrt_kl < 0.9 * update.target
        factor = 1.5 if too_far else 1 / 1.5 if too_near else 1.0
        assert after.coefficient == pytest.approx(min(10, factor * update.coefficient))
        factors.add(factor)
    assert factors >= {1.5, 1 / 1.5}
    targets = [update.target for update in updates]
    assert targets == pytest.approx([SMALL.target * (1 - index / 30) for index in range(30)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "ppo"}, "sets 'method' to 'ppo', but one of cpg, cppo_sqrt, cppo_linear is needed"),
        (
            {"time_step": 0.0},
            "^ControlConfig sets 'time_step' to 0.0, but a number",
        ),
        ({"updates": 0}, "sets 'updates' to 0, but a whole number"),
    ],
)
def test_settings_that_cannot_be_run_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)
