"""On data with two modes the optimal control moves the right mass between them, and keeps each mode's shape."""

import math
from dataclasses import dataclass

import pytest
import torch

from rpo.process.continuous import grid_at
from rpo.process.schedule import RectifiedFlow
from rpo.process.transition import Ddim, EulerMaruyama
from tests.analytic.chains import StartAt, angle_times, draw, grid_from
from tests.analytic.closed_forms import Mixture, Quadratic, tilted_mixture
from tests.analytic.toys import OptimalControl, ToyModel, linear_vp

pytestmark = pytest.mark.analytic

COUNT = 40_000


@dataclass(frozen=True)
class Case:
    prior: Mixture
    reward: Quadratic
    beta: float
    valley: float
    """Between the modes of the tilted law."""


CASES = {
    "printed": Case(Mixture((-1.0, 1.5), (0.2, 0.5), (0.3, 0.7)), Quadratic(1.5, 1.2), 0.5, 0.0),
    "towards the small mode": Case(Mixture((-1.2, 1.4), (0.15, 0.3), (0.25, 0.75)), Quadratic(0.4, -0.4), 0.6, 0.1),
    "away from the large mode": Case(Mixture((-1.5, 1.0), (0.3, 0.1), (0.8, 0.2)), Quadratic(0.5, 0.8), 1.2, 0.1),
}


def toy(case, family, control=None):
    control = control or OptimalControl(case.prior, case.reward, case.beta, 1.0)
    if family == "flow":
        return ToyModel(case.prior, RectifiedFlow(start=0.998), control, "flow")
    return ToyModel(case.prior, linear_vp(num_train_timesteps=100_000), control)


def mass_below(mixture, x):
    rows = zip(mixture.weights, mixture.means, mixture.variances, strict=True)
    return sum(w * 0.5 * (1 + math.erf((x - m) / math.sqrt(2 * S))) for w, m, S in rows)


def ends(case, family, kernel, *, is_tuned=True, control=None):
    model = toy(case, family, control)
    if not is_tuned:
        model = ToyModel(case.prior, model.process, None, model.prediction_type)
    times = angle_times(model.process, 200)
    at = times[:1]
    alpha, sigma = model.process.alpha(at).item(), model.process.sigma(at).item()
    mean, variance = case.prior.moments
    kernel = StartAt(kernel, alpha * mean, alpha**2 * variance + sigma**2)
    grid = grid_from(grid_at(model.process, times, dtype=torch.float64))
    return draw(model, grid, kernel, count=COUNT)[0]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("family", "kernel"),
    [("vp", EulerMaruyama(1.0)), ("flow", EulerMaruyama(1.0)), ("vp", Ddim(0.0))],
    ids=["vp sde", "flow sde", "vp ode"],
)
def test_modes_have_their_tilted_weights(name, family, kernel):
    case = CASES[name]
    tilted = tilted_mixture(case.prior, case.reward, case.beta)
    x_0 = ends(case, family, kernel)
    below = (x_0 < case.valley).double().mean().item()
    assert below == pytest.approx(mass_below(tilted, case.valley), rel=0.02, abs=0.002)
    assert (x_0.mean().item(), x_0.var().item()) == pytest.approx(tilted.moments, rel=0.02, abs=0.015)


@pytest.mark.parametrize("name", CASES)
def test_without_the_control_they_keep_their_own(name):
    """And those differ, so that the test above could fail."""
    case = CASES[name]
    below = (ends(case, "vp", Ddim(1.0), is_tuned=False) < case.valley).double().mean().item()
    assert below == pytest.approx(mass_below(case.prior, case.valley), abs=0.01)
    tilted = tilted_mixture(case.prior, case.reward, case.beta)
    assert abs(mass_below(tilted, case.valley) - below) > 0.1


def test_the_printed_weights():
    tilted = tilted_mixture(CASES["printed"].prior, CASES["printed"].reward, 0.5)
    assert tilted.weights == pytest.approx((0.00596, 0.99404), abs=1e-4)
