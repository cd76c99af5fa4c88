"""Only what is tuned at noise level 1 may be sampled with another noise level.

The optimal velocity of every lambda ends at the tilted law under the SDE it was tuned for. Under the ODE (eta = 0) only
that of lambda = 1 does; a smaller lambda overshoots and narrows, a larger one falls short and stays wide.
"""

import math

import pytest
import torch

from rpo.models.solvers import BlackBoxSolver
from rpo.process.continuous import grid_at, uniform_times
from rpo.process.schedule import RectifiedFlow
from rpo.process.transition import Ddim, EulerMaruyama
from rpo.sampling.sample import sample
from tests.analytic.chains import StartAt, chain, draw, grid_from, snr_times
from tests.analytic.closed_forms import OTHER, PRINTED, PROBLEMS
from tests.analytic.toys import OptimalControl, ToyModel, linear_vp

pytestmark = pytest.mark.analytic

FIRST_ALPHA = 1e-6
"""Where sampling starts: so low because a small lambda forgets as slowly as alpha^lambda."""

COUNT = 40_000

ODE_TABLE = {
    0.245: (1.0725, 0.1128),
    0.5: (1.0356, 0.1398),
    1.0: (0.9727, 0.1818),
    2.0: (0.8972, 0.2365),
    4.0: (0.8264, 0.2918),
}
"""Mean and variance of the ODE's end at the printed constants, by the lambda of the tuning."""


def tuned(problem, level):
    control = OptimalControl(problem.prior, problem.quadratic, problem.beta, math.sqrt(level))
    return ToyModel(problem.prior, RectifiedFlow(start=1 - FIRST_ALPHA), control, "flow")


def start_of(problem):
    (m,), (S,) = problem.prior.means, problem.prior.variances
    return FIRST_ALPHA * m, FIRST_ALPHA**2 * S + (1 - FIRST_ALPHA) ** 2


def target(problem):
    return problem.quadratic.tilted(problem.prior.means[0], problem.prior.variances[0], problem.beta)


def ode_end(problem, level):
    """Mean and variance by integrating the velocity's own linear equation, with another method (midpoint)."""
    (m,), (S,), beta, (q, c) = (
        problem.prior.means,
        problem.prior.variances,
        problem.beta,
        vars(problem.quadratic).values(),
    )

    def velocity(a):
        total = a**2 * S + (1 - a) ** 2
        phi = (S / total) ** ((1 + level) / 2) * a**level
        gain = 2 * level / (1 + level) * (1 - a) / a / beta * phi * q / (1 + (S - phi**2 * total) * q / beta)
        rate = (a * S - (1 - a)) / total - gain * phi
        return rate, m - rate * a * m - gain * (phi * -a * m + m - c) - gain * phi * a * m

    mean, scale, alphas = FIRST_ALPHA * m, 1 - FIRST_ALPHA, torch.logspace(-6, 0, 20_001, dtype=torch.float64).tolist()
    for a, b in zip(alphas[:-1], alphas[1:], strict=True):
        rate, shift = velocity((a + b) / 2)
        grown = math.exp(rate * (b - a))
        mean = grown * mean + shift * (grown - 1) / rate
        scale *= grown
    return mean, scale**2


def end(problem, level, kernel, num_steps=20_000):
    model = tuned(problem, level)
    grid = grid_at(model.process, snr_times(model.process, num_steps), dtype=torch.float64)
    exact = chain(model, grid, kernel, start=start_of(problem))
    return exact.mean[-1].item(), exact.variance[-1].item()


@pytest.mark.parametrize("level", ODE_TABLE)
def test_the_ode_ends_as_the_table_says(level):
    assert ode_end(PRINTED, level) == pytest.approx(ODE_TABLE[level], abs=2e-4)
    assert end(PRINTED, level, Ddim(0.0)) == pytest.approx(ODE_TABLE[level], rel=0.01)


@pytest.mark.parametrize("level", ODE_TABLE)
def test_the_ode_ends_elsewhere_at_other_constants(level):
    assert end(OTHER, level, Ddim(0.0)) == pytest.approx(ode_end(OTHER, level), rel=0.01)
    is_unbiased = end(OTHER, level, Ddim(0.0)) == pytest.approx(target(OTHER), rel=0.01)
    assert is_unbiased == (level == 1.0)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("level", ODE_TABLE)
@pytest.mark.parametrize("kernel", [Ddim, EulerMaruyama])
def test_the_sde_it_was_tuned_for_ends_at_the_tilted_law(problem, level, kernel):
    assert end(problem, level, kernel(math.sqrt(level))) == pytest.approx(target(problem), rel=0.01)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_tuned_at_one_any_noise_level_and_both_processes_end_at_the_tilted_law(problem):
    model = tuned(problem, 1.0)
    for process, eta in [(model.process, 0.6), (linear_vp(num_train_timesteps=100_000), 0.0)]:
        other = ToyModel(problem.prior, process, model.denoiser.correction)
        grid = grid_at(process, snr_times(process, 20_000), dtype=torch.float64)
        exact = chain(other, grid, Ddim(eta), start=(0.0, 1.0))
        assert (exact.mean[-1].item(), exact.variance[-1].item()) == pytest.approx(target(problem), rel=0.01)


def drawn(problem, level, kernel, num_steps):
    """Ends by the package's sampler, and the exact mean and variance of as many steps."""
    model = tuned(problem, level)
    grid = grid_at(model.process, snr_times(model.process, num_steps, last=3.5), dtype=torch.float64)
    exact = chain(model, grid, kernel, start=start_of(problem))
    (x_0,) = draw(model, grid_from(grid), StartAt(kernel, *start_of(problem)), count=COUNT)
    return x_0, exact.mean[-1].item(), exact.variance[-1].item()


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("level", [0.245, 1.0, 4.0])
@pytest.mark.parametrize("is_ode", [True, False], ids=["ode", "sde"])
def test_sample_draws_the_chain(problem, level, is_ode):
    x_0, mean, variance = drawn(problem, level, Ddim(0.0 if is_ode else math.sqrt(level)), 150)
    assert x_0.mean().item() == pytest.approx(mean, abs=4 * math.sqrt(variance / COUNT))
    assert x_0.var().item() == pytest.approx(variance, rel=4 * math.sqrt(2 / COUNT))


@pytest.mark.parametrize("level", [0.245, 1.0])
@pytest.mark.parametrize("is_ode", [True, False], ids=["ode", "sde"])
def test_sample_ends_as_the_table_says(level, is_ode):
    x_0, *_ = drawn(PRINTED, level, Ddim(0.0 if is_ode else math.sqrt(level)), 400)
    for ours, theirs in zip((x_0.mean().item(), x_0.var().item()), ODE_TABLE[level if is_ode else 1.0], strict=True):
        assert abs(ours - theirs) < 0.01 * (1 + abs(theirs))


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_a_second_order_solver_gets_nearer_with_as_many_steps(problem):
    """What is tuned at noise level 1 goes with any solver; this one is a black box with its own grid."""
    control = OptimalControl(problem.prior, problem.quadratic, problem.beta, 1.0)
    model = ToyModel(problem.prior, linear_vp(), control, latent_shape=(1, 1, 2))

    def distance(kernel, grid):
        generator = torch.Generator().manual_seed(0)
        cond = model.encode_prompts([""])
        latents = sample(model, cond, grid, kernel, guidance_scale=1.0, generators=[generator]).latents
        (first, second), (first_end, second_end) = latents[0].flatten().tolist(), latents[-1].flatten().tolist()
        slope = (first_end - second_end) / (first - second)  # an ODE with Gaussian data is affine in its start
        found = first_end - slope * first, slope**2
        return max(abs(ours - theirs) for ours, theirs in zip(found, target(problem), strict=True))

    solver = BlackBoxSolver(model, 20)
    second_order = distance(solver, solver.grid)
    assert second_order < 0.03
    assert second_order < 0.5 * distance(Ddim(0.0), grid_at(model.process, uniform_times(model.process, 20)))
