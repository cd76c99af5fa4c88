import math
from dataclasses import replace

import pytest
import torch
from scipy.integrate import solve_ivp

from examples.continuous_control.lq import (
    LinearPolicy,
    LinearQuadratic,
    Quadratic,
    exact_gradient,
    objective,
    optimal_policy,
    optimal_value,
    policy_value,
)
from tests.examples.continuous_control.problems import CASES, DEFAULT, IDS, OTHER, PROBLEMS


def states(*values):
    return torch.tensor(values, dtype=torch.float64)


def objective_by_moments(problem, policy):
    """J from the differential equations of mean and second moment of the relaxed state, without any value function."""
    p, f1, f0, variance = problem, *(float(x) for x in (policy.slope, policy.intercept, policy.variance))
    drift, push = p.drift_state + p.drift_action * f1, p.drift_action * f0
    noise, kick = p.noise_state + p.noise_action * f1, p.noise_action * f0

    def rates(t, y):
        mean, square, _ = y
        action, cross, action_square = f1 * mean + f0, f1 * square + f0 * mean, 0.0
        action_square = f1**2 * square + 2 * f1 * f0 * mean + f0**2 + variance
        quadratic = 0.5 * p.cost_state * square + p.cost_cross * cross + 0.5 * p.cost_action * action_square
        reward = -(quadratic + p.cost_state_linear * mean + p.cost_action_linear * action)
        entropy = 0.5 * math.log(2 * math.pi * math.e * variance)
        spread = noise**2 * square + 2 * noise * kick * mean + kick**2 + p.noise_action**2 * variance
        income = math.exp(-p.discount * t) * (reward + p.entropy_weight * entropy)
        return [drift * mean + push, 2 * drift * square + 2 * push * mean + spread, income]

    start = [p.start_mean, p.start_mean**2 + p.start_std**2, 0.0]
    return solve_ivp(rates, (0, 40 / p.discount), start, rtol=1e-10, atol=1e-12).y[2, -1]


@CASES
def test_objective_is_the_discounted_return_of_the_relaxed_dynamics(problem, policy):
    assert float(objective(problem, policy)) == pytest.approx(objective_by_moments(problem, policy), abs=1e-8)


@CASES
def test_exact_gradient_is_that_of_the_discounted_return(problem, policy):
    step, numeric = 1e-4, []
    for index in range(3):
        shift = torch.zeros(3, dtype=torch.float64)
        shift[index] = step
        up, down = (objective_by_moments(problem, LinearPolicy(policy.weights + sign * shift)) for sign in (1, -1))
        numeric.append((up - down) / (2 * step))
    assert exact_gradient(problem, policy).tolist() == pytest.approx(numeric, abs=1e-5)


@CASES
def test_exact_gradient_leaves_the_policy_as_it_was(problem, policy):
    before = policy.weights.clone()
    exact_gradient(problem, policy)
    assert torch.equal(policy.weights, before) and not policy.weights.requires_grad


@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
def test_no_policy_nearby_is_better_than_the_optimal_one(problem):
    best = optimal_policy(problem)
    assert exact_gradient(problem, best).abs().max() < 1e-12
    for index in range(3):
        for change in (-0.1, 0.1):
            shift = torch.zeros(3, dtype=torch.float64)
            shift[index] = change
            assert objective(problem, LinearPolicy(best.weights + shift)) < objective(problem, best)


def test_value_without_any_effect_of_actions_is_that_of_the_reward_alone():
    # x' = -x from 1 without noise, reward -x²/2 - a²/2: V = -1/2 ∫ e^{-t} e^{-2t} dt - (variance/2 - λ entropy)/ρ.
    problem = LinearQuadratic(
        drift_action=0.0,
        noise_state=0.0,
        noise_action=0.0,
        cost_state=1.0,
        cost_cross=0.0,
        cost_state_linear=0.0,
        cost_action_linear=0.0,
    )
    best, value = optimal_policy(problem), optimal_value(problem)
    assert float(best.slope) == float(best.intercept) == 0
    assert float(best.variance) == pytest.approx(0.1)
    constant = 0.1 * 0.5 * math.log(2 * math.pi * math.e * 0.1) - 0.05
    assert float(value(states(1.0))) == pytest.approx(-1 / 6 + constant)


def test_quadratic_has_its_slope_and_its_mean():
    value = Quadratic(*states(-2.0, 0.5, 3.0))
    assert value(states(0.0, 2.0)).tolist() == [3.0, 0.0]
    assert value.slope(states(0.0, 2.0)).tolist() == [0.5, -3.5]
    assert float(value.mean(2.0, 3.0)) == pytest.approx(-1 * (4 + 9) + 0.5 * 2 + 3)


def test_policy_says_its_actions():
    policy = LinearPolicy.of(-0.5, 0.25, 0.04)
    actions = policy.actions(states(0.0, 1.0))
    assert actions.mean.tolist() == pytest.approx([0.25, -0.25])
    assert actions.stddev.tolist() == pytest.approx([0.2, 0.2])
    assert float(policy.entropy) == pytest.approx(0.5 * math.log(2 * math.pi * math.e * 0.04))


@CASES
def test_relaxed_noise_averages_the_square_of_the_noise_over_the_actions(problem, policy):
    x = states(-2.0, 0.0, 1.0)
    actions = policy.actions(x)
    # Two equal actions at ± one standard deviation have the mean and the variance of the policy.
    both = [problem.noise(x, actions.mean + sign * actions.stddev) ** 2 for sign in (1, -1)]
    relaxed = problem.relaxed_noise(x, actions.mean, policy.variance)
    assert torch.allclose(relaxed**2, sum(both) / 2, atol=1e-12)


def test_kl_between_policies():
    old, new = LinearPolicy.of(0.0, 0.0, 1.0), LinearPolicy.of(1.0, 0.0, 4.0)
    expected = [math.log(2) + (1 + x**2) / 8 - 0.5 for x in (0.0, 3.0)]
    assert old.kl(new, states(0.0, 3.0)).tolist() == pytest.approx(expected)


def test_copies_do_not_share_weights():
    policy = LinearPolicy.of(0.0, 0.0, 1.0)
    trainable = policy.copy(is_trainable=True)
    assert trainable.weights.requires_grad and not policy.weights.requires_grad
    with torch.no_grad():
        trainable.weights.add_(1)
    assert policy.weights.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"discount": 0.0}, r"^discount is 0.0, but it must be > 0; "),
        ({"entropy_weight": -1.0}, r"^entropy_weight is -1.0, but it must be > 0; "),
        ({"start_std": -1.0}, r"^start_std is -1.0, but it must be >= 0; "),
        ({"cost_cross": 1.5}, r"^cost_cross is 1.5, but its square must be below .* = 2.0; bring it closer to 0"),
        ({"drift_state": 0.6}, r"^discount is 1.0, but .* grows at the rate .* 1.24; choose a discount above it"),
    ],
)
def test_problems_without_a_finite_optimum_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(DEFAULT, **change)


def test_a_policy_that_drives_the_state_away_has_no_value():
    with pytest.raises(ValueError, match=r"^under a policy of slope 3, x² grows faster than the discount 1.0 forgets"):
        policy_value(DEFAULT, LinearPolicy.of(3.0, 0.0, 1.0))
    policy_value(OTHER, LinearPolicy.of(0.9, 0.0, 1.0))
