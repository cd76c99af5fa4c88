"""Continuous schedules: exact where a closed form is known, the derivatives of what they return, and their ends."""

import math

import pytest
import torch

from rpo.models.checkpoint import Checkpoint
from rpo.process.grid import vp_node
from rpo.process.schedule import RectifiedFlow, VariancePreserving
from tests.tiny import tiny_scheduler, tiny_sd

FIRST_BETA, LAST_BETA = 0.1, 20.0


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def linear_log_alpha(t):
    return -0.5 * (FIRST_BETA * t + 0.5 * (LAST_BETA - FIRST_BETA) * t**2)


def linear_process(count=50):
    knots = torch.arange(1, count + 1, dtype=torch.float64) / count
    return VariancePreserving((2 * linear_log_alpha(knots)).exp(), 1.0)


def stable_diffusion_process(**changes):
    scheduler = tiny_scheduler(**changes)
    return VariancePreserving(scheduler.alphas_cumprod, float(scheduler.final_alpha_cumprod))


PROCESSES = {
    "linear": linear_process(),
    "stable diffusion": stable_diffusion_process(),
    "cosine": stable_diffusion_process(beta_schedule="squaredcos_cap_v2"),
    "zero terminal SNR": stable_diffusion_process(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "flow": RectifiedFlow(start=0.999),
}


def times_inside(process, count=400):
    return torch.linspace(process.end + 1e-4, process.start - 1e-4, count, dtype=torch.float64)


def test_the_linear_beta_schedule_is_interpolated_exactly():
    process, t = linear_process(), torch.linspace(0, 1, 777, dtype=torch.float64)
    assert (process.alpha(t).log() - linear_log_alpha(t)).abs().max() < 1e-12
    beta = FIRST_BETA + (LAST_BETA - FIRST_BETA) * t
    assert (process.drift(t) + beta / 2).abs().max() < 1e-10
    assert (process.diffusion(t) - beta).abs().max() < 1e-10


@pytest.mark.parametrize("changes", [{}, {"beta_schedule": "squaredcos_cap_v2"}, {"set_alpha_to_one": True}])
def test_training_timesteps_keep_their_values(changes):
    abar = tiny_scheduler(**changes).alphas_cumprod
    process, index = stable_diffusion_process(**changes), torch.arange(1000)
    t = (index + 1).double() / 1000
    node = vp_node(abar, index, dtype=torch.float64)
    assert (process.alpha(t) - node.alpha.flatten()).abs().max() < 1e-12
    assert (process.sigma(t) - node.sigma.flatten()).abs().max() < 1e-12
    assert (process.timestep(t) - index).abs().max() < 1e-9


@pytest.mark.parametrize("name", PROCESSES)
def test_drift_and_diffusion_are_the_derivatives_of_the_moments(name):
    process = PROCESSES[name]
    t = times_inside(process).requires_grad_(True)
    (log_alpha_rate,) = torch.autograd.grad(process.alpha(t).log().sum(), t)
    (variance_rate,) = torch.autograd.grad((process.sigma(t) ** 2).sum(), t)
    drift, diffusion = process.drift(t).detach(), process.diffusion(t).detach()
    assert torch.allclose(drift, log_alpha_rate, rtol=1e-8)
    assert torch.allclose(diffusion, variance_rate - 2 * drift * process.sigma(t).detach() ** 2, rtol=1e-8)


@pytest.mark.parametrize("name", PROCESSES)
def test_noise_rises_and_g_squared_is_not_negative(name):
    process = PROCESSES[name]
    t = times_inside(process, 20_000)
    assert (process.alpha(t).diff() < 0).all()
    assert (process.sigma(t).diff() > 0).all()
    assert (process.diffusion(t) >= 0).all()
    assert (process.timestep(t).diff() >= 0).all()


def test_the_slope_has_no_jump_at_a_training_timestep():
    process, knots = PROCESSES["stable diffusion"], torch.arange(2, 1000).double() / 1000
    jumps = process.drift(knots + 1e-9) - process.drift(knots - 1e-9)
    steps = process.drift(knots + 1e-3).diff()
    assert jumps.abs().max() < 1e-3 * steps.abs().max()


@pytest.mark.parametrize("slow", [10, 1])
def test_a_kinked_schedule_stays_monotone(slow):
    """Also where the kink is beside an end, whose slope is guessed from two rises."""
    ends = torch.full((slow,), 1e-4)
    log_abar = -torch.cat([ends, torch.full((3,), 1.0), ends]).double().cumsum(0)
    process = VariancePreserving(log_abar.exp(), 1.0)
    t = torch.linspace(0, 1, 50_001, dtype=torch.float64)
    assert (process.diffusion(t) >= 0).all()
    assert (process.alpha(t).log().diff() <= 0).all()


def test_between_training_timesteps_the_cubic_is_far_more_exact_than_a_chord():
    full = stable_diffusion_process()
    knots = torch.arange(10, 1001, 10).double() / 1000
    thinned = VariancePreserving(full.alpha(knots) ** 2, 1.0)
    t = torch.linspace(0.02, 0.98, 333, dtype=torch.float64)
    assert (thinned.alpha(t).log() - full.alpha(t).log()).abs().max() < 1e-5
    left = (t * 100).floor() / 100
    share = (t - left) * 100
    chord = (1 - share) * full.alpha(left).log() + share * full.alpha(left + 0.01).log()
    assert (chord - full.alpha(t).log()).abs().max() > 1e-4


def test_ends_are_where_the_checkpoint_reads_its_image():
    assert (PROCESSES["stable diffusion"].start, PROCESSES["stable diffusion"].end) == (1.0, 0.001)
    assert stable_diffusion_process(set_alpha_to_one=True).end == 0.0
    clean = stable_diffusion_process(set_alpha_to_one=True)
    assert clean.alpha(double(0.0)).item() == 1.0
    assert clean.sigma(double(0.0)).item() == 0.0
    assert clean.timestep(double(0.0, 0.0005, 0.001, 0.0015)).tolist() == pytest.approx([0.0, 0.0, 0.0, 0.5])


def test_zero_terminal_snr_starts_at_the_last_finite_moment():
    process = PROCESSES["zero terminal SNR"]
    assert process.start == 0.999
    assert process.timestep(double(process.start)).item() == pytest.approx(998)
    assert process.alpha(double(process.start)).item() > 0
    with pytest.raises(
        ValueError, match=r"times span \[1, 1\], but .* noise at 0.999 to data at 0; .*zero terminal SNR"
    ):
        process.alpha(double(1.0))


@pytest.mark.parametrize("method", ["alpha", "sigma", "drift", "diffusion", "timestep"])
@pytest.mark.parametrize("process", [linear_process(), RectifiedFlow()], ids=["vp", "flow"])
@pytest.mark.parametrize("t", [-1e-6, 1.01, math.nan])
def test_times_outside_are_refused(process, method, t):
    with pytest.raises(
        ValueError, match="times span .* but this process runs from noise at 1 to data at 0; stay between"
    ):
        getattr(process, method)(double(0.5, t))


def test_rectified_flow():
    process, t = RectifiedFlow(500, start=0.98), double(0.0, 0.25, 0.5)
    assert process.alpha(t).tolist() == [1.0, 0.75, 0.5]
    assert process.sigma(t).tolist() == [0.0, 0.25, 0.5]
    assert process.drift(t).tolist() == pytest.approx([-1.0, -4 / 3, -2.0])
    assert process.diffusion(t).tolist() == pytest.approx([0.0, 2 / 3, 2.0])
    assert process.timestep(t).tolist() == [0.0, 125.0, 250.0]
    assert (process.start, process.end) == (0.98, 0.0)
    assert RectifiedFlow().diffusion(double(1.0)).item() == math.inf


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.5), (1.1, 0.0), (1.0, -0.1)])
def test_a_flow_that_does_not_run_from_noise_to_data_is_refused(start, end):
    with pytest.raises(ValueError, match=f"^start is {start} and end {end}, but time runs from noise 1 to data 0"):
        RectifiedFlow(start=start, end=end)


@pytest.mark.parametrize(
    "abar", [[0.9, 0.9, 0.8], [0.9, 0.5, 0.6], [1.0, 0.9, 0.8], [0.9, 0.0, 0.0], [0.9, 0.8]], ids=str
)
def test_a_schedule_that_does_not_fall_is_refused(abar):
    with pytest.raises(
        ValueError, match=f"^alphas_cumprod has {len(abar)} values that do not fall strictly .* betas of"
    ):
        VariancePreserving(double(*abar), 1.0)


def test_a_final_alpha_from_nowhere_is_refused():
    with pytest.raises(ValueError, match=r"^final_alpha_cumprod is 0.99, .*; give 1 or alphas_cumprod\[0\] = 0.9"):
        VariancePreserving(double(0.9, 0.5, 0.1), 0.99)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_pipeline_has_the_process_of_its_scheduler(prediction_type):
    pipe = tiny_sd(prediction_type)
    model = Checkpoint(pipe)
    t = double(0.001, 0.5, 1.0)
    expected = pipe.scheduler.alphas_cumprod[[0, 499, 999]].double().sqrt()
    assert torch.allclose(model.process.alpha(t), expected, rtol=1e-9)
    assert model.process is model.process
    assert (model.process.start, model.process.end) == (1.0, 0.001)
