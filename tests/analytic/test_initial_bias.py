"""The optimal control reaches the tilted law only if the start is forgotten, or tilted too.

From the reference's marginal N(M, Sigma) at the first node, where the start is remembered with (Phi, C), the optimum
ends at

    linear reward:     N(m + C a/beta, S)                        instead of  N(m + S a/beta, S)
    quadratic reward:  mean C* (m/C + q c/beta), variance C* + (C*/C)² Phi² Sigma,    1/C* = 1/C + q/beta,

and is worth J* = E V*(start). The start tilted by exp(V*/beta) ends at the tilted law itself.
"""

import math
from dataclasses import dataclass

import pytest
import torch

from rpo.process.continuous import grid_at
from rpo.process.schedule import RectifiedFlow
from rpo.process.transition import Ddim, EulerMaruyama
from tests.analytic.chains import StartAt, chain, draw, grid_from, path_cost, snr_times
from tests.analytic.closed_forms import OTHER, PRINTED, Linear, Problem, memory
from tests.analytic.toys import OptimalControl, ToyModel, linear_vp

pytestmark = pytest.mark.analytic


@dataclass(frozen=True)
class Case:
    problem: Problem
    family: str
    eta: float
    start: float
    """Time at which sampling starts."""


CASES = {
    "vp eta 1": Case(PRINTED, "vp", 1.0, 1.0),
    "vp eta 1 from 0.35": Case(PRINTED, "vp", 1.0, 0.35),
    "vp eta 0.5 from 0.35": Case(PRINTED, "vp", 0.5, 0.35),
    "flow lambda 0.245 from 0.98": Case(PRINTED, "flow", math.sqrt(0.245), 0.98),
    "other, vp eta 0.6 from 0.5": Case(OTHER, "vp", 0.6, 0.5),
    "other, flow lambda 0.5 from 0.95": Case(OTHER, "flow", math.sqrt(0.5), 0.95),
}

PRINTED_VALUES = {
    ("vp eta 1", "linear"): (1.33999, 0.4, 0.815996),
    ("vp eta 1", "quadratic"): (0.972725, 0.181818, -0.282342),
    ("vp eta 1 from 0.35", "linear"): (1.251843, 0.4, 0.780737),
    ("vp eta 1 from 0.35", "quadratic"): (0.954264, 0.182818, -0.290048),
    ("vp eta 0.5 from 0.35", "linear"): (0.950103, 0.4, 0.660041),
    ("vp eta 0.5 from 0.35", "quadratic"): (0.859619, 0.219346, -0.348197),
    ("flow lambda 0.245 from 0.98", "linear"): (1.264060, 0.4, None),
    ("flow lambda 0.245 from 0.98", "quadratic"): (0.957000, 0.182544, None),
}
"""Mean, variance and value of the untilted start."""


def toy(case, reward):
    problem = case.problem
    control = OptimalControl(problem.prior, reward, problem.beta, case.eta)
    if case.family == "flow":
        return ToyModel(problem.prior, RectifiedFlow(start=case.start), control, "flow")
    return ToyModel(problem.prior, linear_vp(*problem.betas, num_train_timesteps=100_000), control)


def at_start(case, model):
    """Phi, C and Sigma there, and the mean of the marginal."""
    t = torch.tensor(case.start, dtype=torch.float64)
    alpha, sigma = model.process.alpha(t).item(), model.process.sigma(t).item()
    return *memory(model.prior.variances[0], alpha, sigma, case.eta), alpha * model.prior.means[0]


def biased(case, model, reward):
    """Mean, variance and value from the untilted start."""
    phi, spread, total, _ = at_start(case, model)
    (m,), (S,), beta = model.prior.means, model.prior.variances, case.problem.beta
    mean, narrowed = reward.tilted(m, spread, beta)
    variance = narrowed + (narrowed / spread) ** 2 * phi**2 * total
    value = reward.value(m, spread, beta)
    if isinstance(reward, Linear):
        assert variance == pytest.approx(S)
        return mean, variance, value
    return mean, variance, value - reward.q / 2 * phi**2 * total / (1 + spread * reward.q / beta)


def tilted_start(case, model, reward):
    """Mean and variance of the marginal times exp(V*/beta)."""
    phi, spread, total, mean = at_start(case, model)
    (m,), beta = model.prior.means, case.problem.beta
    if isinstance(reward, Linear):
        return mean + total * phi * reward.a / beta, total
    precision = reward.q / (beta + spread * reward.q)  # of V*/beta, as a function of the expected x_0
    variance = 1 / (1 / total + phi**2 * precision)
    return mean + variance * phi * precision * (reward.c - m), variance


def reward_of(case, kind):
    return case.problem.linear if kind == "linear" else case.problem.quadratic


def grid_of(case, model, num_steps, last=6.0):
    times = snr_times(model.process, num_steps, start=case.start, last=last)
    return grid_at(model.process, times, dtype=torch.float64)


@pytest.mark.parametrize(("name", "kind"), PRINTED_VALUES)
def test_the_formulas_give_the_printed_values(name, kind):
    case = CASES[name]
    reward = reward_of(case, kind)
    for ours, printed in zip(biased(case, toy(case, reward), reward), PRINTED_VALUES[name, kind], strict=True):
        assert printed is None or ours == pytest.approx(printed, abs=2e-6)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["linear", "quadratic"])
@pytest.mark.parametrize("kernel", [Ddim, EulerMaruyama])
def test_from_the_marginal_the_optimum_is_biased_as_predicted(name, kind, kernel):
    case = CASES[name]
    reward, beta = reward_of(case, kind), case.problem.beta
    model = toy(case, reward)
    _, _, total, mean = at_start(case, model)
    grid = grid_of(case, model, 20_000)
    exact = chain(model, grid, kernel(case.eta), start=(mean, total))
    mean, variance = exact.mean[-1].item(), exact.variance[-1].item()
    expected_reward = reward(mean) - (0 if kind == "linear" else reward.q / 2 * variance)
    value = expected_reward - beta * path_cost(model, grid, exact, eta=case.eta)
    assert (mean, variance, value) == pytest.approx(biased(case, model, reward), rel=2e-3, abs=1e-3)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["linear", "quadratic"])
@pytest.mark.parametrize("kernel", [Ddim, EulerMaruyama])
def test_from_the_tilted_start_there_is_no_bias(name, kind, kernel):
    case = CASES[name]
    reward = reward_of(case, kind)
    model = toy(case, reward)
    exact = chain(model, grid_of(case, model, 20_000), kernel(case.eta), start=tilted_start(case, model, reward))
    (m,), (S,) = model.prior.means, model.prior.variances
    expected = reward.tilted(m, S, case.problem.beta)
    assert (exact.mean[-1].item(), exact.variance[-1].item()) == pytest.approx(expected, rel=2e-3, abs=1e-3)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("is_tilted", [False, True], ids=["marginal", "tilted"])
def test_sample_ends_there(name, is_tilted):
    """Drawn by the package's sampler: on the chain of its steps, and near the end of continuous time."""
    case, count = CASES[name], 40_000
    reward, kernel = case.problem.quadratic, Ddim(case.eta)
    model = toy(case, reward)
    _, _, total, mean = at_start(case, model)
    start = tilted_start(case, model, reward) if is_tilted else (mean, total)
    grid = grid_of(case, model, 400, last=3.5)
    (x_0,) = draw(model, grid_from(grid), StartAt(kernel, *start), count=count)
    found = x_0.mean().item(), x_0.var().item()
    exact = chain(model, grid, kernel, start=start)
    variance = exact.variance[-1].item()
    assert found[0] == pytest.approx(exact.mean[-1].item(), abs=4 * math.sqrt(variance / count))
    assert found[1] == pytest.approx(variance, rel=4 * math.sqrt(2 / count))
    (m,), (S,) = model.prior.means, model.prior.variances
    expected = reward.tilted(m, S, case.problem.beta) if is_tilted else biased(case, model, reward)[:2]
    for ours, theirs in zip(found, expected, strict=True):
        assert abs(ours - theirs) < 0.01 * (1 + abs(theirs))


def test_the_bias_is_large_where_the_start_is_remembered():
    """So that the tests above can tell the two laws apart."""
    case = CASES["vp eta 0.5 from 0.35"]
    reward = case.problem.quadratic
    model = toy(case, reward)
    assert biased(case, model, reward)[:2] == pytest.approx((0.8596, 0.2193), abs=1e-4)
    assert reward.tilted(0.7, 0.4, 0.5) == pytest.approx((0.9727, 0.1818), abs=1e-4)
