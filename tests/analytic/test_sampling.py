"""The reference sampler keeps the marginals, and remembers its start as Phi and C say, at every noise level.

In two parts that leave little to chance: what `sample` draws is the chain of its kernel's transitions, and that chain
tends to the closed form of continuous time as steps shrink. One direct comparison for each process beside them.
"""

import math

import pytest
import torch

from rpo.process.continuous import grid_at
from rpo.process.schedule import RectifiedFlow
from rpo.process.transition import Ddim, EulerMaruyama
from tests.analytic.chains import StartAt, angle_times, chain, draw, grid_from, snr_times
from tests.analytic.closed_forms import PROBLEMS, memory
from tests.analytic.toys import ToyModel, linear_vp

pytestmark = pytest.mark.analytic

LEVELS = {
    "vp": {"0.3": 0.3, "1": 1.0, "1.7": 1.7},
    "flow": {"lambda 0.245": math.sqrt(0.245), "lambda 1": 1.0, "lambda 2": math.sqrt(2)},
}
CASES = [(family, eta) for family, levels in LEVELS.items() for eta in levels.values()]
NAMES = [f"{family} {name}" for family, levels in LEVELS.items() for name in levels]


def toy(family, problem):
    if family == "flow":
        return ToyModel(problem.prior, RectifiedFlow(start=0.98), prediction_type="flow")
    return ToyModel(problem.prior, linear_vp(*problem.betas, num_train_timesteps=100_000))


def marginal(model, t):
    """Mean and variance of x_t."""
    at = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = model.process.alpha(at).item(), model.process.sigma(at).item()
    mean, variance = model.prior.moments
    return alpha * mean, alpha**2 * variance + sigma**2


def remembered(model, t, eta):
    at = torch.tensor(t, dtype=torch.float64)
    return memory(model.prior.variances[0], model.process.alpha(at).item(), model.process.sigma(at).item(), eta)[:2]


def estimated_memory(x_t, x_0):
    """Slope and residual variance of x_0 on x_t."""
    phi = ((x_t - x_t.mean()) * (x_0 - x_0.mean())).mean() / x_t.var()
    return phi.item(), (x_0 - phi * x_t).var().item()


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize(("family", "eta"), CASES, ids=NAMES)
@pytest.mark.parametrize("kernel", [Ddim, EulerMaruyama])
def test_sample_draws_the_chain_of_its_kernel(problem, family, eta, kernel):
    model, count, node = toy(family, problem), 100_000, 24
    grid = grid_at(model.process, snr_times(model.process, 48, last=3.0), dtype=torch.float64)
    start = marginal(model, model.process.start)
    exact = chain(model, grid, kernel(eta), start=start)
    x_t, x_0 = draw(model, grid_from(grid), StartAt(kernel(eta), *start), count=count, nodes=[node + 1])
    for x, at in ((x_t, node), (x_0, -1)):
        mean, variance = exact.mean[at].item(), exact.variance[at].item()
        assert x.mean().item() == pytest.approx(mean, abs=4 * math.sqrt(variance / count))
        assert x.var().item() == pytest.approx(variance, rel=4 * math.sqrt(2 / count))
    phi, spread = exact.memory(node)
    error = math.sqrt(spread / exact.variance[node].item() / count)
    assert estimated_memory(x_t, x_0) == (
        pytest.approx(phi, abs=4 * error),
        pytest.approx(spread, rel=4 * math.sqrt(2 / count)),
    )


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize(("family", "eta"), CASES, ids=NAMES)
@pytest.mark.parametrize("kernel", [Ddim, EulerMaruyama])
def test_the_chain_tends_to_the_closed_form(problem, family, eta, kernel):
    model, errors = toy(family, problem), []
    for num_steps in (10_000, 20_000):
        times = snr_times(model.process, num_steps)
        grid = grid_at(model.process, times, dtype=torch.float64)
        exact = chain(model, grid, kernel(eta), start=marginal(model, model.process.start))
        nodes = [num_steps // 4, num_steps // 2, 3 * num_steps // 4]
        expected = [marginal(model, times[node].item()) for node in [*nodes, -1]]
        found = list(zip(exact.mean[[*nodes, -1]].tolist(), exact.variance[[*nodes, -1]].tolist(), strict=True))
        found += [exact.memory(node) for node in nodes]
        expected += [remembered(model, times[node].item(), eta) for node in nodes]
        errors.append((torch.tensor(found) - torch.tensor(expected)).abs() / (1 + torch.tensor(expected).abs()))
    assert errors[1].max() < 5e-3
    assert errors[1].norm() < 0.6 * errors[0].norm()


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("family", LEVELS)
def test_a_sampler_of_usual_length_ends_at_the_data_and_forgets_its_start(problem, family):
    model, num_steps = toy(family, problem), 400
    times = angle_times(model.process, num_steps)
    start, node = marginal(model, model.process.start), num_steps // 2
    grid = grid_from(grid_at(model.process, times, dtype=torch.float64))
    x_t, x_0 = draw(model, grid, StartAt(EulerMaruyama(1.0), *start), count=100_000, nodes=[node + 1])
    expected = [*model.prior.moments, *remembered(model, times[node].item(), 1.0)]
    found = [x_0.mean().item(), x_0.var().item(), *estimated_memory(x_t, x_0)]
    assert found == pytest.approx(expected, rel=0.01, abs=0.01)
