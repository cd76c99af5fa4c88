"""Grids of a process, and the price of a change of score against every route by which it can be derived."""

import math

import pytest
import torch

from rpo.models.checkpoint import Checkpoint
from rpo.process.continuous import (
    control_cost,
    cost_weight,
    grid_at,
    jittered_times,
    running_cost,
    uniform_times,
)
from rpo.process.grid import flow_grid, vp_grid
from rpo.process.schedule import RectifiedFlow
from rpo.process.transition import Ddim, EulerMaruyama, added_variance
from rpo.sampling.sample import image_generator, sample
from rpo.types import Grid, Node
from tests.process.test_process import PROCESSES, double, linear_process, stable_diffusion_process
from tests.tiny import tiny_scheduler, tiny_sd

ETAS = [0.3, 1.0, 1.7]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("num_steps", [7, 20])
@pytest.mark.parametrize("changes", [{}, {"set_alpha_to_one": True}, {"beta_schedule": "squaredcos_cap_v2"}])
def test_at_training_timesteps_a_grid_is_that_of_the_discrete_schedule(num_steps, changes):
    scheduler = tiny_scheduler(**changes)
    scheduler.set_timesteps(num_steps)
    expected = vp_grid(scheduler.alphas_cumprod, scheduler.timesteps, float(scheduler.final_alpha_cumprod))
    process = stable_diffusion_process(**changes)
    times = torch.cat([(scheduler.timesteps + 1).double() / 1000, double(process.end)])
    grid = grid_at(process, times)
    assert grid.alpha.dtype == grid.timestep.dtype == torch.float32
    for ours, theirs in [(grid.alpha, expected.alpha), (grid.sigma, expected.sigma)]:
        assert (ours - theirs).abs().max() < 1e-6
    assert (grid.timestep - expected.timestep).abs().max() < 1e-4


def test_a_grid_of_rectified_flow():
    process = RectifiedFlow()
    grid, expected = grid_at(process, uniform_times(process, 4)), flow_grid(torch.linspace(1, 0, 5))
    assert torch.equal(grid.alpha, expected.alpha)
    assert torch.equal(grid.sigma, expected.sigma)
    assert torch.equal(grid.timestep, expected.timestep)


@pytest.mark.parametrize("name", PROCESSES)
def test_uniform_times_run_from_end_to_end(name):
    process = PROCESSES[name]
    times = uniform_times(process, 8)
    assert (times[0].item(), times[-1].item()) == (process.start, process.end)
    assert torch.allclose(times.diff(), times.diff()[0], rtol=1e-9)
    assert grid_at(process, times, dtype=torch.float64).alpha.dtype == torch.float64


def test_jittered_times_move_inside_their_cells():
    process = PROCESSES["stable diffusion"]
    uniform, cell = uniform_times(process, 10), (process.start - process.end) / 10
    draws = torch.stack(
        [jittered_times(process, 10, torch.Generator().manual_seed(seed), jitter=0.8) for seed in range(200)]
    )
    moves = (draws - uniform) / cell
    assert (moves[:, [0, -1]] == 0).all()
    assert 0.38 < moves.abs().max() <= 0.4
    assert moves[:, 1:-1].mean().abs() < 0.03
    assert (draws.diff() < 0).all()
    assert torch.equal(draws[3], jittered_times(process, 10, torch.Generator().manual_seed(3), jitter=0.8))
    assert torch.equal(jittered_times(process, 10, torch.Generator().manual_seed(0), jitter=0.0), uniform)


def test_a_single_step_has_nothing_to_move():
    process = PROCESSES["stable diffusion"]
    times = jittered_times(process, 1, torch.Generator().manual_seed(0), jitter=0.9)
    assert times.tolist() == [process.start, process.end]


@pytest.mark.parametrize("jitter", [-0.1, 1.0, math.nan])
def test_jitter_that_lets_nodes_pass_is_refused(jitter):
    with pytest.raises(ValueError, match=f"^jitter is {jitter}, but nodes must not pass each other; give a share"):
        jittered_times(RectifiedFlow(), 4, torch.Generator(), jitter=jitter)


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="^num_steps is 0, but a grid needs a step; ask for 1 or more"):
        uniform_times(RectifiedFlow(), 0)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([1.0, 0.5, 0.0], r"times span \[0, 1\], but this process runs from noise at 1 to data at 0.001; stay"),
        ([0.5, 0.6, 0.001], "must run from noise to data, but .* at step 0"),
        ([0.5, 0.5, 0.001], "must run from noise to data, but .* at step 0"),
        ([0.5], "a grid has 1 nodes, but a step needs two"),
    ],
)
def test_grids_that_leave_the_process_or_turn_are_refused(times, message):
    with pytest.raises(ValueError, match=message):
        grid_at(PROCESSES["stable diffusion"], double(*times))


@pytest.mark.parametrize("prediction_type", ["epsilon", pytest.param("v_prediction", marks=pytest.mark.slow)])
def test_a_real_network_is_sampled_on_any_grid_of_its_process(prediction_type):
    """Between training timesteps too; the ODE's end converges to one point however the grid is cut."""
    model = Checkpoint(tiny_sd(prediction_type))
    cond = model.encode_prompts(["a red circle", ""])

    def end(times):
        generators = [image_generator(0, image, 0) for image in range(2)]
        grid = grid_at(model.process, times, device=model.device)
        return sample(model, cond, grid, Ddim(eta=0.0), guidance_scale=2.0, generators=generators).x_0

    times = [uniform_times(model.process, 100)]
    times += [jittered_times(model.process, 100, torch.Generator().manual_seed(1), jitter=0.9)]
    times += [uniform_times(model.process, 10)]
    fine, moved, coarse = map(end, times)
    assert (grid_at(model.process, times[0]).timestep % 1 > 0.01).any()
    assert (moved - fine).abs().max() < 0.25 * (coarse - fine).abs().max()


def node(process, t):
    at = double(t)[0]
    return Node(process.alpha(at), process.sigma(at), process.timestep(at))


def gap(policy, reference, t: Node, s: Node, kernel):
    """KL of the two transitions of one noisy point."""
    x_t = randn(2, 1, 2, 2, seed=9)
    first, second = (kernel((x_t - t.sigma * eps) / t.alpha, eps, t, s) for eps in (policy, reference))
    return first.kl(second)


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("name", PROCESSES)
def test_euler_maruyama_s_kl_is_the_running_cost_for_any_step(name, eta):
    eps, eps_ref, process = randn(2, 1, 2, 2), randn(2, 1, 2, 2, seed=1), PROCESSES[name]
    for t, s in [(0.9, 0.1), (0.5, 0.4), (0.02, 0.01)]:
        t, s = node(process, t), node(process, s)
        expected = running_cost(eps, eps_ref, t, s, eta=eta)
        assert torch.allclose(gap(eps, eps_ref, t, s, EulerMaruyama(eta)), expected, rtol=1e-9)


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("kernel", [Ddim, EulerMaruyama])
@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("t", [0.8, 0.31, 0.1])
def test_a_kernel_s_kl_per_unit_time_is_half_the_squared_control(name, kernel, eta, t):
    """Three routes: the transitions' KL, the difference of the reverse drifts over the noise, and the closed form."""
    process, at = PROCESSES[name], double(t)[0]
    eps, eps_ref, here = randn(2, 1, 2, 2), randn(2, 1, 2, 2, seed=1), node(PROCESSES[name], t)
    x_t, score, score_ref = randn(2, 1, 2, 2, seed=2), -eps / here.sigma, -eps_ref / here.sigma
    drift, diffusion = process.drift(at), process.diffusion(at)
    drifts = [-drift * x_t + (1 + eta**2) / 2 * diffusion * one for one in (score, score_ref)]
    control = (drifts[0] - drifts[1]) / (eta * process.diffusion(at).sqrt())
    expected = 0.5 * (control**2).sum(dim=(1, 2, 3))
    assert torch.allclose(control_cost(score, score_ref, diffusion=process.diffusion(at), eta=eta), expected, rtol=1e-9)
    # Forward differences are of first order in the step, so two of them extrapolate to the limit.
    step = 1e-5
    near, far = (gap(eps, eps_ref, here, node(process, t - k * step), kernel(eta)) / (k * step) for k in (1, 2))
    assert torch.allclose(2 * near - far, expected, rtol=1e-6)


@pytest.mark.parametrize("eta", ETAS)
def test_the_cost_that_the_authors_code_adds_up(eta):
    """Of arXiv:2502.01819: ((1 + eta²)/(2 eta))² |Δs|² log(abar_s / abar_t), twice the running cost."""
    process, delta = linear_process(), randn(1, 1, 1, 1)
    t, s = 0.5, 0.5 - 1e-6
    theirs = (
        ((1 + eta**2) / (2 * eta)) ** 2 * delta**2 * (2 * (process.alpha(double(s)) / process.alpha(double(t))).log())
    )
    at, after = node(process, t), node(process, s)
    ours = running_cost(-at.sigma * delta, 0 * delta, at, after, eta=eta)
    middle = process.diffusion(double((t + s) / 2))
    exact = control_cost(delta, 0 * delta, diffusion=middle, eta=eta) * (t - s)
    assert theirs.item() / 2 == pytest.approx(exact.item(), rel=1e-9)
    assert theirs.item() / 2 == pytest.approx(ours.item(), rel=1e-4)
    # Over a longer way too, their logarithm is ∫g² exactly.
    times = torch.linspace(0.7, 0.2, 200_001, dtype=torch.float64)
    integral = torch.trapezoid(process.diffusion(times), times).abs()
    logarithm = 2 * (process.alpha(double(0.2)) / process.alpha(double(0.7))).log()
    assert logarithm.item() == pytest.approx(integral.item(), rel=1e-9)


@pytest.mark.parametrize("level", [0.245, 1.0, 2.0])
@pytest.mark.parametrize("t", [0.05, 0.5, 0.9])
def test_the_cost_in_velocities_of_rectified_flow(level, t):
    """½|u|² = (1 + lambda)² (1 - t) / (4 lambda t) |Δv|², where the score changes by -(1 - t)/t Δv."""
    process, delta = RectifiedFlow(), randn(2, 1, 2, 2)
    expected = (1 + level) ** 2 * (1 - t) / (4 * level * t) * (delta**2).sum(dim=(1, 2, 3))
    score = -(1 - t) / t * delta
    ours = control_cost(score, 0 * score, diffusion=process.diffusion(double(t)[0]), eta=math.sqrt(level))
    assert torch.allclose(ours, expected, rtol=1e-12)


def test_flow_grpo_s_noise_is_a_member_of_the_family():
    """Its sigma² = a² t / (1 - t) is eta² g² at eta² = a² / 2."""
    t, a = double(0.1, 0.5, 0.9), 0.7
    assert torch.allclose(a**2 / 2 * RectifiedFlow().diffusion(t), a**2 * t / (1 - t), rtol=1e-12)


def test_weights():
    assert cost_weight(1.0) == 1.0
    assert cost_weight(0.5) == pytest.approx(1.5625)
    assert min(cost_weight(eta / 100) for eta in range(10, 400)) == 1.0
    assert cost_weight(0.5) == pytest.approx(cost_weight(2.0))
    assert cost_weight(0.0) == 1.0


def test_an_ode_pays_as_the_memoryless_sampler():
    eps, eps_ref = randn(2, 1, 2, 2), randn(2, 1, 2, 2, seed=1)
    t, s = (node(PROCESSES["stable diffusion"], at) for at in (0.6, 0.5))
    assert torch.equal(running_cost(eps, eps_ref, t, s, eta=0.0), running_cost(eps, eps_ref, t, s, eta=1.0))


def test_running_cost_takes_a_node_per_sample_and_computes_in_float32():
    grid = grid_at(PROCESSES["stable diffusion"], uniform_times(PROCESSES["stable diffusion"], 10))
    picked = torch.tensor([2, 7])
    t = Node(*(values[picked][:, None, None, None] for values in (grid.alpha, grid.sigma, grid.timestep)))
    s = Node(*(values[picked + 1][:, None, None, None] for values in (grid.alpha, grid.sigma, grid.timestep)))
    eps, eps_ref = randn(2, 1, 2, 2).bfloat16(), randn(2, 1, 2, 2, seed=1).bfloat16()
    both = running_cost(eps, eps_ref, t, s, eta=1.0)
    assert both.dtype == torch.float32
    for row, step in enumerate((2, 7)):
        single = running_cost(eps[row : row + 1], eps_ref[row : row + 1], grid[step], grid[step + 1], eta=1.0)
        assert torch.allclose(both[row], single[0], rtol=1e-6)


def test_added_variance_of_a_fine_grid_adds_up_like_g_squared():
    process = PROCESSES["stable diffusion"]
    times = torch.linspace(0.7, 0.2, 2001, dtype=torch.float64)
    grid = grid_at(process, times, dtype=torch.float64)
    total = sum(added_variance(grid[step], grid[step + 1]) for step in range(grid.num_steps))
    assert isinstance(grid, Grid)
    exact = torch.trapezoid(process.diffusion(times), times).abs()
    assert total.item() == pytest.approx(exact.item(), rel=2e-3)
