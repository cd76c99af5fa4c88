"""Policy and critic losses of score-as-action against a problem whose objective is known in closed form.

A random walk x_{k+1} = x_k + drift + std z from x_0 = 0 of K steps, whose only parameter is `drift`; the reference
drifts `REFERENCE`; the reward is slope x - curve x² / 2. The end is N(m, v) with m = K drift and v = K std², hence

    J = slope m - curve (m² + v) / 2 - kl_weight K (drift - REFERENCE)² / (2 std²).
"""

import pytest
import torch
from rpo.objectives.score_as_action import (
    endpoint,
    explained_variance,
    likelihood,
    log_ratio_cost,
    martingale,
    monte_carlo,
    pathwise,
    temporal_difference,
)

from rpo.objectives.advantages import gae

STEPS, STD, REFERENCE, SLOPE, CURVE, KL_WEIGHT = 4, 0.5, -0.2, 1.0, 0.6, 0.3


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reward(x):
    return SLOPE * x - CURVE * x**2 / 2


def value(steps_left, x, drift):
    """E[reward at the end] of the walk without costs, exactly."""
    mean = x + steps_left * drift
    return SLOPE * mean - CURVE * (mean**2 + steps_left * STD**2) / 2


def objective_gradient(drift):
    m = STEPS * drift
    return STEPS * (SLOPE - CURVE * m - KL_WEIGHT * (drift - REFERENCE) / STD**2)


def walk(drift, batch=200_000):
    noise = randn(STEPS, batch)
    return torch.cat([torch.zeros(1, batch, dtype=torch.float64), (drift + STD * noise).cumsum(0)])


def log_prob(x, drift):
    return -0.5 * ((x[1:] - x[:-1] - drift) / STD) ** 2


def kl(drift):
    return 0.5 * ((drift - REFERENCE) / STD) ** 2


def descent(loss, drift):
    """The gradient that descending the loss follows, to compare with that of J."""
    (grad,) = torch.autograd.grad(loss, drift)
    return -grad.item()


@pytest.mark.parametrize("drift", [-0.2, 0.3])
def test_pathwise_gradient_is_that_of_the_objective(drift):
    drift = torch.tensor(drift, dtype=torch.float64, requires_grad=True)
    x = walk(drift.detach()).requires_grad_()
    steps_left = torch.arange(STEPS, -1, -1)[:, None]
    (value_gradient,) = torch.autograd.grad(value(steps_left, x, drift.detach()).sum(), x)
    mean = (x[:-1].detach() + drift)[..., None, None]
    moved = torch.stack(
        [pathwise(m[..., None], g[:, None, None, None]) for m, g in zip(mean, value_gradient[1:], strict=True)]
    )
    loss = moved.sum(0).mean() + STEPS * KL_WEIGHT * kl(drift)
    assert descent(loss, drift) == pytest.approx(objective_gradient(drift.item()), abs=0.01)


@pytest.mark.parametrize("trace", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["state", "sample"])
def test_likelihood_gradient_is_that_of_the_objective(trace, kind):
    """With the cost as a function of the state plus its explicit gradient, or as a sampled log-ratio without one."""
    drift = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x = walk(drift.detach())
    new = log_prob(x, drift)
    steps_left = torch.arange(STEPS, -1, -1)[:, None]
    costs = log_ratio_cost(new, log_prob(x, torch.tensor(REFERENCE))) if kind == "sample" else kl(drift).detach()
    costs = KL_WEIGHT * costs.expand(STEPS, x.shape[1])
    values = value(steps_left, x, drift.detach()) - KL_WEIGHT * steps_left * kl(drift.detach())
    advantages = gae(values, costs, trace=trace)
    loss = likelihood(new.flatten(), advantages.flatten()).view_as(new).sum(0).mean()
    if kind == "state":
        without = torch.autograd.grad(loss, drift, retain_graph=True)[0].item()
        loss = loss + STEPS * KL_WEIGHT * kl(drift)
        assert abs(without + objective_gradient(0.3)) > 1  # the trap: what is missing without that term
    assert descent(loss, drift) == pytest.approx(objective_gradient(0.3), abs=0.05)


def test_mean_of_the_log_ratio_is_the_kl_and_carries_no_gradient():
    drift = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x = walk(drift.detach())
    costs = log_ratio_cost(log_prob(x, drift), log_prob(x, torch.tensor(REFERENCE)))
    assert costs.mean().item() == pytest.approx(kl(drift).item(), rel=0.01)
    assert not costs.requires_grad


def test_pathwise_sums_over_dimensions_in_float32_and_leaves_the_value_alone():
    mean = torch.ones(2, 4, 8, 8, dtype=torch.float16, requires_grad=True)
    slope = torch.full((2, 4, 8, 8), 300.0, dtype=torch.float16, requires_grad=True)
    loss = pathwise(mean, slope)
    assert loss.tolist() == [-76_800, -76_800]  # float16 ends at 65,504
    loss.sum().backward()
    assert torch.equal(mean.grad, -slope)
    assert slope.grad is None


def path(steps=5, batch=3):
    return randn(steps + 1, batch), randn(steps, batch, seed=1).abs()


def value_gradient_of(loss, values):
    (grad,) = torch.autograd.grad(loss.sum(), values)
    return grad


def test_temporal_difference_has_no_gradient_through_its_target():
    values, costs = path()
    values.requires_grad_()
    loss = temporal_difference(values[:-1].flatten(), values[1:].flatten(), costs.flatten())
    grad = value_gradient_of(loss, values)
    assert torch.allclose(grad[:-1], values[:-1] - (values[1:] - costs))
    assert grad[-1].tolist() == [0, 0, 0]


def test_martingale_runs_from_temporal_difference_to_monte_carlo():
    values, costs = path()
    values.requires_grad_()
    one_step = temporal_difference(values[:-1].flatten(), values[1:].flatten(), costs.flatten())
    assert torch.equal(
        value_gradient_of(martingale(values, costs, trace=0.0), values), value_gradient_of(one_step, values)
    )
    returns = values[-1] - costs.flip(0).cumsum(0).flip(0)
    to_the_end = monte_carlo(values[:-1].flatten(), returns.flatten())
    grad = value_gradient_of(martingale(values, costs, trace=1.0), values)
    assert torch.allclose(grad, value_gradient_of(to_the_end, values), rtol=0, atol=1e-14)


def test_martingale_gradient_is_the_orthogonality_condition_with_eligibility_traces():
    values, costs = path()
    values.requires_grad_()
    slopes = randn(5, seed=2)  # dV_k / dphi of a critic with one parameter
    grad = value_gradient_of(martingale(values, costs, trace=0.7), values)[:-1]
    increments = (values[1:] - values[:-1] - costs).detach()
    condition = sum(
        increments[k] * sum(0.7 ** (k - j) * slopes[j] for j in range(k + 1)) for k in range(increments.shape[0])
    )
    assert torch.allclose(-(grad * slopes[:, None]).sum(0), condition)


def test_full_gradient_of_squared_increments_would_learn_the_wrong_value():
    """Why it is not offered: V = weight x of a Brownian motion with reward x is right at weight 1; that finds 0."""
    increments = randn(50, 2000) / 50**0.5
    x = torch.cat([torch.zeros(1, 2000, dtype=torch.float64), increments.cumsum(0)])
    costs = torch.zeros(50, 2000, dtype=torch.float64)

    def slope(loss_of, at):
        weight = torch.tensor(at, dtype=torch.float64, requires_grad=True)
        values = torch.cat([weight * x[:-1], x[-1:]])
        return torch.autograd.grad(loss_of(values).mean(), weight)[0].item()

    for trace in (0.0, 1.0):
        assert slope(lambda values, trace=trace: martingale(values, costs, trace=trace), 1.0) == pytest.approx(
            0, abs=0.02
        )
        assert slope(lambda values, trace=trace: martingale(values, costs, trace=trace), 0.5) < -1e-3
    # The last increment, where the reward is given, is the only one that holds it up at all.
    inner = [slope(lambda values: (values[1:-1] - values[:-2]) ** 2, at) for at in (1.0, 0.5)]
    assert inner[0] == pytest.approx(2 * inner[1])
    assert inner[1] > 0.01


def test_explained_variance_of_perfect_constant_and_opposite_values():
    returns = randn(100)
    assert explained_variance(returns, returns).item() == 1
    assert explained_variance(torch.zeros_like(returns), returns).item() == pytest.approx(0)
    assert explained_variance(returns + 3, returns).item() == pytest.approx(1)
    assert explained_variance(-returns, returns).item() == pytest.approx(-3)
    assert explained_variance(0.5 * returns, returns).item() == pytest.approx(0.75)


def test_explained_variance_of_equal_returns_is_not_a_number():
    assert explained_variance(torch.zeros(3), torch.full((3,), 0.1)).isnan()


@pytest.mark.parametrize(
    ("kl", "advantage", "expected"),
    [(0.9, 1.0, 1.0), (0.6, 1.0, 0.0), (1.5, 1.0, 1.0), (1.2, -1.0, -1.0), (1.5, -1.0, 0.0), (0.6, -1.0, -1.0)],
    ids=["pull", "pulled enough", "pull back", "push", "pushed enough", "push away again"],
)
def test_a_clipped_point_says_no_more_where_it_has_moved_far_enough(kl, advantage, expected):
    kl = torch.tensor([kl], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([1.0], dtype=torch.float64)
    loss = endpoint(kl, torch.tensor([advantage], dtype=torch.float64), reference_kl=reference, clip=0.3)
    (gradient,) = torch.autograd.grad(loss.sum(), kl)
    assert gradient.item() == expected


def test_a_wide_clip_changes_nothing():
    kl, advantage = randn(8).abs(), randn(8, seed=1)
    assert torch.equal(endpoint(kl, advantage), endpoint(kl, advantage, reference_kl=torch.ones(8), clip=1e9))
