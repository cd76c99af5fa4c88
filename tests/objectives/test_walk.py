"""The policy gradients of score as action against a problem whose objective is known in closed form.

A random walk x_{k+1} = x_k + drift + std z from x_0 = 0 of K steps, whose only parameter is `drift`; the reference
drifts `REFERENCE`; the reward is slope x - curve x² / 2. The end is N(m, v) with m = K drift and v = K std², hence

    J = slope m - curve (m² + v) / 2 - kl_weight K (drift - REFERENCE)² / (2 std²).
"""

import pytest
import torch

from rpo.objectives.advantages import gae
from rpo.objectives.policy_gradient import log_ratio_cost, pathwise, plain

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
    surrogate = plain(new.flatten(), new.detach().flatten(), advantages.flatten(), num_dims=1)
    loss = surrogate.loss.view_as(new).sum(0).mean()
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
