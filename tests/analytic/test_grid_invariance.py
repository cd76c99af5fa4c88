"""The gradient is that of continuous time: it does not depend on how finely time is cut, but for an error like 1/N.

The continuous-time objective of a linear policy is two moments and a cost, whose differential equations are integrated
here from the process alone: no kernel, no grid, no sampling.
"""

import pytest
import torch
from torch import nn

from rpo.process.continuous import cost_weight, grid_at, uniform_times
from rpo.process.schedule import RectifiedFlow, VariancePreserving
from rpo.process.transition import Ddim, EulerMaruyama
from tests.analytic.closed_forms import OTHER, PRINTED
from tests.analytic.linear_quadratic import (
    Case,
    double,
    error,
    gradient,
    move,
    objective,
    score_as_action,
    steps_of,
    trained,
)
from tests.analytic.toys import LinearCorrection, ToyModel, linear_vp

pytestmark = pytest.mark.analytic

GRIDS = (5, 10, 20, 40, 80)
FIRST_ORDER = 2.5
"""Relative error of the exact gradient of N steps, times N: what the cases below stay under."""


class FadingCorrection(nn.Module):
    """A linear change of score that vanishes with the data, as that of the optimum does."""

    def __init__(self, mean):
        super().__init__()
        self.mean, self.theta = mean, nn.Parameter(torch.zeros(2))

    def forward(self, x_t, alpha, sigma, time):
        return alpha * (self.theta[0] + self.theta[1] * (x_t - alpha * self.mean))


def cosine():
    knots = torch.arange(1, 1001, dtype=torch.float64) / 1000
    return VariancePreserving(torch.cos(1.5 * knots) ** 2, 1.0)


PROCESSES = {"linear betas": linear_vp(), "cosine": cosine(), "flow": RectifiedFlow(start=0.98)}


def toy(problem, process, correction, theta):
    kind = "flow" if isinstance(process, RectifiedFlow) else "epsilon"
    correction.theta.data = torch.tensor(theta, dtype=torch.float64)
    return ToyModel(problem.prior, process, correction, kind)


def continuous(model, problem, *, eta, start=(0.0, 1.0), count=1000):
    """(J, dJ/dtheta), by Runge-Kutta steps that are even in time."""
    (m,), (S,) = model.prior.means, model.prior.variances
    process, correction = model.process, model.denoiser.correction
    edges = torch.linspace(process.start, process.end, 2 * count + 1, dtype=torch.float64)
    alpha, sigma, f, g2 = (of(edges) for of in (process.alpha, process.sigma, process.drift, process.diffusion))
    total = alpha**2 * S + sigma**2
    b = correction(torch.zeros_like(edges), alpha, sigma, edges)
    a = correction(torch.ones_like(edges), alpha, sigma, edges) - b
    push = (1 + eta**2) / 2 * g2
    slope, offset = push * (a - 1 / total) - f, push * (b + alpha * m / total)

    def rate(state, at):
        mean, variance, _ = state
        paid = cost_weight(eta) * 0.5 * g2[at] * ((a[at] * mean + b[at]) ** 2 + a[at] ** 2 * variance)
        return torch.stack([slope[at] * mean + offset[at], 2 * slope[at] * variance + eta**2 * g2[at], paid])

    state, h = torch.tensor([*start, 0.0], dtype=torch.float64), (process.start - process.end) / count
    for at in range(0, 2 * count, 2):
        first = rate(state, at)
        second = rate(state + h / 2 * first, at + 1)
        third = rate(state + h / 2 * second, at + 1)
        state = state + h / 6 * (first + 2 * second + 2 * third + rate(state + h * third, at + 2))
    mean, variance, cost = state
    q, c = problem.quadratic.q, problem.quadratic.c
    value = -0.5 * q * ((mean - c) ** 2 + variance) - problem.beta * cost
    return value.item(), torch.autograd.grad(value, correction.theta)[0].double()


def test_continuous_objective_has_the_printed_values():
    process = linear_vp(num_train_timesteps=100_000)
    model = toy(PRINTED, process, LinearCorrection(0.7), (0.3, -0.2))
    alpha = process.alpha(torch.ones((), dtype=torch.float64)).item()
    start = 0.7 * alpha, 0.4 * alpha**2 + 1 - alpha**2
    value, slope = continuous(model, PRINTED, eta=1.0, start=start)
    assert value == pytest.approx(-0.496877, abs=1e-5)
    assert slope.tolist() == pytest.approx([-0.577604, 0.194809], abs=1e-5)
    model = toy(PRINTED, process, LinearCorrection(0.7), (-0.25, 0.35))
    assert continuous(model, PRINTED, eta=1.0, start=start)[0] - value == pytest.approx(-2.444643, abs=1e-5)


def exact(model, problem, kernel, num_steps):
    grid = double(grid_at(model.process, uniform_times(model.process, num_steps), dtype=torch.float64))
    value = objective(trained(steps_of(model, grid, kernel)), problem.quadratic, problem.beta)[0]
    return torch.autograd.grad(value, model.denoiser.correction.theta)[0].double()


@pytest.mark.parametrize("problem", [PRINTED, OTHER], ids=["printed", "other"])
@pytest.mark.parametrize("kernel", [Ddim(1.0), EulerMaruyama(1.0), Ddim(0.7), EulerMaruyama(0.7)], ids=str)
def test_gradient_on_a_grid_tends_to_the_continuous_one(problem, kernel):
    process = linear_vp(*problem.betas, num_train_timesteps=100_000)
    model = toy(problem, process, LinearCorrection(*problem.prior.means), (0.3, -0.2))
    _, limit = continuous(model, problem, eta=kernel.eta)
    coarse, fine = (exact(model, problem, kernel, num_steps) for num_steps in (320, 640))
    assert error(fine, limit) < 0.05
    assert error(fine, limit) == pytest.approx(error(coarse, limit) / 2, rel=0.15)
    assert error(2 * fine - coarse, limit) < 0.005


@pytest.mark.parametrize("estimator", ["pathwise", "likelihood"])
@pytest.mark.parametrize(
    ("problem", "family", "eta"),
    [(PRINTED, "linear betas", 1.0), (OTHER, "cosine", 1.0), (PRINTED, "flow", 1.0), (OTHER, "linear betas", 0.7)],
)
def test_estimated_gradient_is_the_continuous_one_on_every_grid(tmp_path, problem, family, eta, estimator):
    case = Case(problem, (-0.25, 0.35), eta=eta)
    _, limit = continuous(
        toy(problem, PROCESSES[family], FadingCorrection(*problem.prior.means), case.theta), problem, eta=eta
    )
    for num_steps in GRIDS:
        wide = estimator == "pathwise"  # then samples may share an image
        images, width = (4, 8000) if wide else (12_000, 1)
        model = toy(problem, PROCESSES[family], FadingCorrection(*problem.prior.means), (0.0, 0.0))
        model.shape = (1, 1, width)
        trainer = score_as_action(
            case, tmp_path, width=width, model=model, estimator=estimator, rollout=case.rollout(images, num_steps)
        )
        move(trainer, case)
        found = -gradient(trainer, trainer.algorithm.loss).double()
        assert error(found, limit) < 0.03 + FIRST_ORDER / num_steps
