"""Losses of a value: which gradients are those of the right value, and what is said of its quality."""

import pytest
import torch

from rpo.objectives.advantages import traced_returns
from rpo.objectives.value import explained_variance, monte_carlo


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fitted(values, costs, *, trace):
    """The loss that the estimator descends: the distance to traced returns, which carry no gradient."""
    return monte_carlo(values[:-1].flatten(), traced_returns(values, costs, trace=trace).flatten())


def path(steps=5, batch=3):
    return randn(steps + 1, batch).requires_grad_(), randn(steps, batch, seed=1).abs()


def slope_of(loss, values):
    (grad,) = torch.autograd.grad(loss.sum(), values)
    return grad


def test_the_target_runs_from_the_next_node_to_the_end_and_has_no_gradient():
    values, costs = path()
    known = values.detach()
    returns = known[-1] - costs.flip(0).cumsum(0).flip(0)
    for trace, target in ((0.0, known[1:] - costs), (1.0, returns)):
        grad = slope_of(fitted(values, costs, trace=trace), values)
        torch.testing.assert_close(grad[:-1], known[:-1] - target)
        assert grad[-1].tolist() == [0, 0, 0]


def test_its_gradient_is_the_orthogonality_condition_with_eligibility_traces():
    values, costs = path()
    slopes = randn(5, seed=2)  # dV_k / dphi of a value with one parameter
    grad = slope_of(fitted(values, costs, trace=0.7), values)[:-1]
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
        assert slope(lambda values, trace=trace: fitted(values, costs, trace=trace), 1.0) == pytest.approx(0, abs=0.02)
        assert slope(lambda values, trace=trace: fitted(values, costs, trace=trace), 0.5) < -1e-3
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
