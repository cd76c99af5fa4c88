import math

import pytest
import torch

from examples.continuous_control.lq import policy_value
from examples.continuous_control.rollouts import Rollout, advantages, draw, fit_critic, occupation_states, q_hat
from rpo.randomness import keyed_generator
from tests.examples.continuous_control.problems import CASES, DEFAULT, OTHER, POLICIES


def rollout(problem, policy, *, paths, actions_per_state=1, path_step=0.05, time_step=0.005, key="test"):
    return draw(
        problem,
        policy,
        paths=paths,
        actions_per_state=actions_per_state,
        path_step=path_step,
        time_step=time_step,
        generator=keyed_generator(key),
    )


def occupation_moments(problem, policy):
    """Mean and mean square of the state at τ ~ Exp(ρ), from ρ E[f(X_τ)] = ρ f(X_0) + E[generator f]."""
    slope, intercept, variance = (float(x) for x in (policy.slope, policy.intercept, policy.variance))
    drift, push = problem.drift_state + problem.drift_action * slope, problem.drift_action * intercept
    noise, kick = problem.noise_state + problem.noise_action * slope, problem.noise_action * intercept
    rho, start = problem.discount, problem.start_mean
    mean = (rho * start + push) / (rho - drift)
    constant = kick**2 + problem.noise_action**2 * variance
    square = rho * (start**2 + problem.start_std**2) + (2 * push + 2 * noise * kick) * mean + constant
    return mean, square / (rho - 2 * drift - noise**2)


@CASES
def test_states_are_those_of_the_occupation_measure(problem, policy):
    count = 60_000
    x = occupation_states(problem, policy, count, path_step=0.02, generator=keyed_generator("states"))
    mean, square = occupation_moments(problem, policy)
    standard_error = (x.std() / count**0.5, (x**2).std() / count**0.5)
    assert float(x.mean()) == pytest.approx(mean, abs=4 * float(standard_error[0]) + 0.005)
    assert float((x**2).mean()) == pytest.approx(square, abs=4 * float(standard_error[1]) + 0.005)
    # The initial states alone would fail: their moments differ by much more than that tolerance.
    assert abs(square - problem.start_mean**2 - problem.start_std**2) > 0.1


def test_a_rollout_depends_on_its_generator_alone():
    first, again, other = (rollout(DEFAULT, POLICIES[0], paths=50, key=key) for key in ("a", "a", "b"))
    assert torch.equal(first.x_next, again.x_next)
    assert not torch.equal(first.x_next, other.x_next)


def test_every_action_is_tried_under_a_noise_and_its_opposite():
    policy, time_step = POLICIES[0], 0.01
    seen = rollout(DEFAULT, policy, paths=7, actions_per_state=3, time_step=time_step)
    assert len(seen.x) == 2 * 7 * 3
    for values in (seen.x, seen.action, seen.log_prob, seen.reward):
        assert torch.equal(*values.chunk(2))
    up, down = seen.x_next.chunk(2)
    x, action = seen.x[:21], seen.action[:21]
    assert torch.allclose((up + down) / 2, x + DEFAULT.drift(x, action) * time_step, atol=1e-12)
    assert (up - down).abs().min() > 0
    assert len(x.unique()) == 7 and len(action.unique()) == 21


@CASES
def test_q_hat_tends_to_q(problem, policy):
    value = policy_value(problem, policy)
    x, action = (t.reshape(-1) for t in torch.meshgrid(*[torch.linspace(-2, 2, 9).double()] * 2, indexing="ij"))
    errors = []
    for time_step in (0.02, 0.01):
        moved = x + problem.drift(x, action) * time_step
        spread = problem.noise(x, action) * math.sqrt(time_step)
        estimates = []
        for x_next in (moved + spread, moved - spread):  # mean and variance of the noise are all that a quadratic sees
            seen = Rollout(x, action, torch.zeros_like(x), problem.reward(x, action), x_next, time_step)
            estimates.append(q_hat(problem, seen, value))
        errors.append((sum(estimates) / 2 - problem.q(x, action, value)).abs().max())
    assert errors[1] < 0.2
    assert float(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)


@CASES
def test_the_fitted_critic_is_the_value_of_the_policy(problem, policy):
    critic = fit_critic(problem, rollout(problem, policy, paths=20_000, actions_per_state=4))
    exact = policy_value(problem, policy)
    x = torch.linspace(-1.5, 1.5, 7).double()
    error = (critic(x) - exact(x)).abs().max() / (exact(x).max() - exact(x).min())
    assert error < 0.02


@CASES
def test_the_fitted_critic_is_the_fixed_point_of_fits_to_its_own_target(problem, policy):
    seen = rollout(problem, policy, paths=200)
    critic = fit_critic(problem, seen)
    income = (seen.reward - problem.entropy_weight * seen.log_prob) * seen.time_step
    target = math.exp(-problem.discount * seen.time_step) * critic(seen.x_next) + income
    features = torch.stack([0.5 * seen.x**2, seen.x, torch.ones_like(seen.x)], dim=1)
    fitted = torch.linalg.lstsq(features, target[:, None]).solution[:, 0]
    assert fitted.tolist() == pytest.approx([float(critic.second), float(critic.first), float(critic.constant)])


@CASES
def test_estimated_advantages_are_the_exact_ones_but_for_noise(problem, policy):
    seen = rollout(problem, policy, paths=20_000)
    exact, up_down = (advantages(problem, policy, seen, exact_q=exact_q) for exact_q in (True, False))
    exact, estimated = exact[:20_000], sum(up_down.chunk(2)) / 2
    assert abs(float((estimated - exact).mean())) < 0.02 * float(exact.std())
    assert torch.corrcoef(torch.stack([exact, estimated]))[0, 1] > 0.9


def test_a_noise_and_its_opposite_keep_the_variance_of_q_hat_small():
    value = policy_value(OTHER, POLICIES[1])
    spreads = []
    for time_step in (0.01, 0.0001):
        seen = rollout(OTHER, POLICIES[1], paths=4000, time_step=time_step)
        up, down = (q_hat(OTHER, seen, value) - OTHER.q(seen.x, seen.action, value)).chunk(2)
        spreads.append((float(((up + down) / 2).std()), float(up.std())))
    (paired, single), (paired_fine, single_fine) = spreads
    assert single_fine > 8 * single
    assert paired_fine < 1.2 * paired
