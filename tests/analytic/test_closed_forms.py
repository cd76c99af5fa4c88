"""The formulas that the other tests rely on, against quadrature and against each other."""

import math

import pytest
import torch

from rpo.process.prediction import to_x0_eps
from rpo.process.schedule import RectifiedFlow
from rpo.types import Node
from tests.analytic.closed_forms import (
    PRINTED,
    PROBLEMS,
    Linear,
    Mixture,
    Quadratic,
    memory,
    optimal_value,
    tilted_mixture,
)
from tests.analytic.toys import LinearCorrection, OptimalControl, ToyModel, linear_vp, time_of, x_of

pytestmark = pytest.mark.analytic

TWO = Mixture((-1.0, 1.5), (0.2, 0.5), (0.3, 0.7))
X = torch.linspace(-12, 12, 24_001, dtype=torch.float64)


def double(value):
    return torch.tensor(value, dtype=torch.float64)


def density(prior):
    rows = zip(prior.weights, prior.means, prior.variances, strict=True)
    return sum(w * (-((X - m) ** 2) / (2 * S)).exp() / math.sqrt(2 * math.pi * S) for w, m, S in rows)


def average(values, weights):
    return (torch.trapezoid(values * weights, X) / torch.trapezoid(weights, X)).item()


@pytest.mark.parametrize("prior", [PRINTED.prior, TWO], ids=["one", "two"])
def test_score_and_posterior_mean(prior):
    alpha, sigma = double(0.6), double(0.7)
    for x in (-0.9, 0.4, 2.0):
        posterior = density(prior) * (-((x - alpha * X) ** 2) / (2 * sigma**2)).exp()
        mean = average(X, posterior)
        x_t = double(x)[None]
        assert prior.posterior_mean(x_t, alpha, sigma).item() == pytest.approx(mean, abs=1e-9)
        assert prior.score(x_t, alpha, sigma).item() == pytest.approx((0.6 * mean - x) / 0.49, abs=1e-9)


@pytest.mark.parametrize("eta", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("process", [linear_vp(), RectifiedFlow()], ids=["vp", "flow"])
def test_memory_solves_the_reverse_equation(process, eta):
    """dPhi and dC along the reverse SDE of a Gaussian, by quadrature over time."""
    S, t = 0.4, 0.6
    times = torch.linspace(0, t, 100_001, dtype=torch.float64)
    total = process.alpha(times) ** 2 * S + process.sigma(times) ** 2
    diffusion = process.diffusion(times)
    rate = -process.drift(times) - (1 + eta**2) / 2 * diffusion / total
    growth = torch.cat([double([0.0]), torch.cumulative_trapezoid(rate, times)])
    phi, spread, _ = memory(S, process.alpha(times[-1:]), process.sigma(times[-1:]), eta)
    assert phi.item() == pytest.approx(growth[-1].exp().item(), rel=1e-6)
    noise = torch.trapezoid((2 * growth).exp() * eta**2 * diffusion, times)
    assert spread.item() == pytest.approx(noise.item(), rel=1e-6)


@pytest.mark.parametrize("reward", [Linear(0.8), Quadratic(1.5, 1.2)], ids=["linear", "quadratic"])
@pytest.mark.parametrize("prior", [PRINTED.prior, TWO], ids=["one", "two"])
def test_the_optimal_value_is_the_soft_maximum_of_the_reward(prior, reward):
    alpha, sigma, beta = double(0.6), double(0.7), 0.5
    for x in (-0.9, 0.4, 2.0):
        posterior = density(prior) * (-((x - alpha * X) ** 2) / (2 * sigma**2)).exp()
        expected = beta * math.log(average((reward(X) / beta).exp(), posterior))
        ours = optimal_value(double(x)[None], alpha, sigma, prior=prior, reward=reward, beta=beta, eta=1.0)
        assert ours.item() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("reward", [Linear(0.3), Quadratic(1.5, 1.2)], ids=["linear", "quadratic"])
@pytest.mark.parametrize("prior", [PRINTED.prior, TWO], ids=["one", "two"])
def test_the_tilted_mixture_is_the_tilted_density(prior, reward):
    expected = density(prior) * (reward(X) / 0.5).exp()
    expected = expected / torch.trapezoid(expected, X)
    assert torch.allclose(density(tilted_mixture(prior, reward, 0.5)), expected, atol=1e-9)


@pytest.mark.parametrize("prior", [PRINTED.prior, TWO], ids=["one", "two"])
def test_at_noise_level_one_the_optimal_score_is_that_of_the_tilted_law(prior):
    reward, beta = Quadratic(1.5, 1.2), 0.5
    x_t = torch.linspace(-2, 2, 9, dtype=torch.float64)
    for at in (0.2, 0.7):
        alpha, sigma = double(at), double(1 - at)
        ours = prior.score(x_t, alpha, sigma) + OptimalControl(prior, reward, beta, 1.0)(x_t, alpha, sigma, alpha)
        assert torch.allclose(ours, tilted_mixture(prior, reward, beta).score(x_t, alpha, sigma), atol=1e-9)


@pytest.mark.parametrize("reward", [Linear(0.8), Quadratic(1.5, 1.2)], ids=["linear", "quadratic"])
@pytest.mark.parametrize("eta", [0.5, 1.4])
def test_the_optimal_control_follows_the_slope_of_the_optimal_value(reward, eta):
    x_t = torch.linspace(-2, 2, 9, dtype=torch.float64).requires_grad_()
    alpha, sigma = double(0.6), double(0.8)
    problem = {"prior": PRINTED.prior, "reward": reward, "beta": 0.5, "eta": eta}
    (slope,) = torch.autograd.grad(optimal_value(x_t, alpha, sigma, **problem).sum(), x_t)
    # u = (1 + eta²)/(2 eta) g Δscore must be eta g ∇V*/beta.
    control = OptimalControl(**problem)(x_t, alpha, sigma, alpha) * (1 + eta**2) / (2 * eta)
    assert torch.allclose(control, eta * slope / 0.5, atol=1e-12)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("process", [linear_vp(), RectifiedFlow(start=0.98)], ids=["vp", "flow"])
def test_prediction_types_say_the_same(problem, process):
    types = ["epsilon", "flow"] if isinstance(process, RectifiedFlow) else ["epsilon", "v_prediction", "sample"]
    x_t = torch.linspace(-2, 2, 8, dtype=torch.float64).view(8, 1, 1, 1)
    timestep = torch.linspace(10, 900, 8, dtype=torch.float64)
    pairs = []
    for prediction_type in types:
        model = ToyModel(problem.prior, process, LinearCorrection(0.7, (0.3, -0.2)).double(), prediction_type)
        time = time_of(process, timestep).view(8, 1, 1, 1)
        node = Node(process.alpha(time), process.sigma(time), time)
        noise_pred = model.predict(x_t, timestep, model.encode_prompts([""] * 8))
        pairs.append(torch.stack(to_x0_eps(noise_pred, x_t, node, prediction_type)))
    for pair in pairs[1:]:
        assert torch.allclose(pair, pairs[0], atol=1e-9)


def test_images_are_latents_one_way_and_back_with_a_gradient():
    latents = torch.randn(3, 1, 2, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    images = ToyModel(PRINTED.prior, linear_vp()).decode(latents)
    assert images.shape == (3, 3, 2, 5)
    assert images.min() > 0
    assert images.max() < 1
    assert torch.allclose(x_of(images), latents, atol=1e-4)
    (gradient,) = torch.autograd.grad(x_of(images).sum(), latents)
    assert torch.allclose(gradient, torch.ones_like(latents), atol=1e-5)
