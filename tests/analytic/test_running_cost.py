"""The KL of one small step of any sampler is ½|u|² per unit time, and along the path it is what the optimum costs."""

import math

import pytest
import torch

from rpo.process.continuous import grid_at
from rpo.process.schedule import RectifiedFlow
from rpo.process.transition import Ddim, EulerMaruyama
from tests.analytic.chains import chain, path_cost, predictions, snr_times
from tests.analytic.closed_forms import PROBLEMS
from tests.analytic.toys import LinearCorrection, OptimalControl, ToyModel, linear_vp

pytestmark = pytest.mark.analytic


def toy(family, problem, correction):
    if family == "flow":
        return ToyModel(problem.prior, RectifiedFlow(start=0.98), correction, "flow")
    return ToyModel(problem.prior, linear_vp(*problem.betas, num_train_timesteps=100_000), correction)


def kl_rate(model, kernel, t, step):
    """KL per unit time of the step from t at x = 0 and x = 1, policy against reference."""
    grid = grid_at(model.process, torch.tensor([t, t - step], dtype=torch.float64), dtype=torch.float64)
    both = []
    for one in (model, ToyModel(model.prior, model.process, None, model.prediction_type)):
        x0_hat, eps_hat, at, after = predictions(one, grid)
        both.append(kernel(x0_hat, eps_hat, at, after))
    return both[0].kl(both[1]) / step


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("eta", [0.3, math.sqrt(0.245), 1.0, 1.7])
@pytest.mark.parametrize("kernel", [Ddim, EulerMaruyama])
@pytest.mark.parametrize("t", [0.2, 0.7])
def test_vp_in_changes_of_score(problem, eta, kernel, t):
    """u = (1 + eta²)/(2 eta) sqrt(beta_t) Δs."""
    theta = (0.3, -0.2)
    model = toy("vp", problem, LinearCorrection(0.7, theta).double())
    alpha = model.process.alpha(torch.tensor(t, dtype=torch.float64)).item()
    rate = problem.betas[0] + (problem.betas[1] - problem.betas[0]) * t
    change = theta[0] + theta[1] * (torch.tensor([0.0, 1.0], dtype=torch.float64) - alpha * 0.7)
    expected = 0.5 * ((1 + eta**2) / (2 * eta)) ** 2 * rate * change**2
    near, far = (kl_rate(model, kernel(eta), t, step) for step in (5e-6, 1e-5))
    assert torch.allclose(2 * near - far, expected, rtol=1e-6)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("level", [0.245, 1.0, 2.0])
@pytest.mark.parametrize("kernel", [Ddim, EulerMaruyama])
@pytest.mark.parametrize("t", [0.2, 0.7])
def test_flow_in_changes_of_velocity(problem, level, kernel, t):
    """½|u|² = (1 + lambda)² alpha/(4 lambda sigma) |Δv|², with the velocities as the network puts them out."""
    control = OptimalControl(problem.prior, problem.quadratic, problem.beta, math.sqrt(level))
    model = toy("flow", problem, control)
    x_t, timestep = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1), torch.tensor(1000 * t).double()
    cond = model.encode_prompts(["", ""])
    reference = ToyModel(problem.prior, model.process, None, "flow")
    change = (model.predict(x_t, timestep, cond) - reference.predict(x_t, timestep, cond)).flatten()
    expected = (1 + level) ** 2 * (1 - t) / (4 * level * t) * change**2
    near, far = (kl_rate(model, kernel(math.sqrt(level)), t, step) for step in (5e-6, 1e-5))
    assert torch.allclose(2 * near - far, expected, rtol=1e-6)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("kind", ["linear", "quadratic"])
def test_along_the_optimal_path_it_adds_up_to_the_kl_of_the_tilted_law(problem, kind):
    """KL(p* ‖ p) = E_p* r/beta - log Z, where the start is forgotten."""
    reward, beta = (problem.linear if kind == "linear" else problem.quadratic), problem.beta
    model = toy("vp", problem, OptimalControl(problem.prior, reward, beta, 1.0))
    grid = grid_at(model.process, snr_times(model.process, 20_000), dtype=torch.float64)
    moments = chain(model, grid, Ddim(1.0), start=(0.0, 1.0))
    (m,), (S,) = problem.prior.means, problem.prior.variances
    mean, variance = reward.tilted(m, S, beta)
    expected_reward = reward(mean) - (0 if kind == "linear" else reward.q / 2 * variance)
    kl = expected_reward / beta - reward.value(m, S, beta) / beta
    assert path_cost(model, grid, moments, eta=1.0) == pytest.approx(kl, rel=0.01)


@pytest.mark.parametrize("eta", [0.5, 1.0, 1.4])
@pytest.mark.parametrize("family", ["vp", "flow"])
def test_on_a_coarse_chain_too_the_running_cost_is_the_kl_of_euler_maruyama(family, eta):
    problem = PROBLEMS["printed"]
    model = toy(family, problem, OptimalControl(problem.prior, problem.quadratic, problem.beta, eta))
    grid = grid_at(model.process, snr_times(model.process, 20), dtype=torch.float64)
    kernel, start = EulerMaruyama(eta), (0.1, 0.9)
    moments = chain(model, grid, kernel, start=start)
    reference = chain(ToyModel(problem.prior, model.process, None, model.prediction_type), grid, kernel, start=start)
    slope, offset = moments.slope - reference.slope, moments.offset - reference.offset
    square = (slope * moments.mean[:-1] + offset) ** 2 + slope**2 * moments.variance[:-1]
    kl = (square / (2 * moments.std**2)).sum().item()
    assert path_cost(model, grid, moments, eta=eta) == pytest.approx(kl, rel=1e-9)
