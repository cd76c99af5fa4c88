"""Kernels against diffusers' schedulers, Gaussian data in closed form, and the theory of their order."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from rpo.process.grid import flow_grid, vp_grid
from rpo.process.prediction import to_x0_eps
from rpo.process.transition import Ddim, EulerMaruyama, Gaussian, added_variance, ddim, euler_maruyama
from rpo.types import Grid, Node
from tests.tiny import tiny_scheduler


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def double_scheduler(num_steps, **changes):
    scheduler = tiny_scheduler(**changes)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = torch.as_tensor(scheduler.final_alpha_cumprod).double()
    scheduler.set_timesteps(num_steps)
    return scheduler


def double_grid(scheduler):
    return vp_grid(
        scheduler.alphas_cumprod,
        scheduler.timesteps,
        float(scheduler.final_alpha_cumprod),
        dtype=torch.float64,
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("changes", [{}, {"set_alpha_to_one": True}, {"timestep_spacing": "trailing"}])
def test_ddim_equals_diffusers_at_every_step(prediction_type, eta, changes):
    scheduler = double_scheduler(20, prediction_type=prediction_type, **changes)
    grid = double_grid(scheduler)
    assert grid.timestep[:-1].tolist() == scheduler.timesteps.tolist()
    for step in range(grid.num_steps):
        t, s = grid[step], grid[step + 1]
        x_t, noise_pred, noise = randn(2, 4, 3, 3, seed=step), randn(2, 4, 3, 3, seed=99), randn(2, 4, 3, 3, seed=7)
        theirs = scheduler.step(noise_pred, t.timestep, x_t, eta=eta, variance_noise=noise if eta else None).prev_sample
        x0_hat, eps_hat = to_x0_eps(noise_pred, x_t, t, prediction_type)
        ours = ddim(x0_hat, eps_hat, t, s, eta=eta).sample(noise)
        assert (ours - theirs).abs().max() < 1e-10


def test_ddim_at_eta_zero_equals_the_flow_matching_euler_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(9)
    grid = flow_grid(scheduler.sigmas.double(), dtype=torch.float64)
    for step in range(9):
        t, s = grid[step], grid[step + 1]
        x_t, flow = randn(2, 4, 3, 3, seed=step), randn(2, 4, 3, 3, seed=50)
        theirs = scheduler.step(flow, scheduler.timesteps[step], x_t).prev_sample
        ours = ddim(*to_x0_eps(flow, x_t, t, "flow"), t, s, eta=0.0).mean
        assert (ours - theirs).abs().max() < 1e-6  # its sigmas are float32


@pytest.mark.parametrize(("kernel", "rule"), [(Ddim, ddim), (EulerMaruyama, euler_maruyama)])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_a_kernel_is_its_rule_at_one_noise_level(kernel, rule, eta):
    grid = uniform_grid(10)
    prediction = randn(2, 1, 2, 2), randn(2, 1, 2, 2, seed=1)
    ours, expected = kernel(eta)(*prediction, grid[3], grid[4]), rule(*prediction, grid[3], grid[4], eta=eta)
    assert torch.equal(ours.mean, expected.mean)
    assert torch.equal(ours.std, expected.std)
    assert kernel(eta).has_density is (eta > 0)
    assert ours.log_prob(prediction[0]).isfinite().all() == kernel(eta).has_density


@pytest.mark.parametrize("kernel", [Ddim, EulerMaruyama])
@pytest.mark.parametrize("eta", [-0.1, math.nan, math.inf])
def test_a_noise_level_below_zero_is_refused(kernel, eta):
    with pytest.raises(ValueError, match=f"^eta is {eta}, but a noise level is finite and >= 0"):
        kernel(eta)


def test_log_prob_is_the_joint_density_of_torch_distributions():
    transition = Gaussian(randn(3, 4, 2, 2), torch.tensor(0.7, dtype=torch.float64))
    x_s = randn(3, 4, 2, 2, seed=1)
    expected = torch.distributions.Normal(transition.mean, 0.7).log_prob(x_s).sum(dim=(1, 2, 3))
    assert torch.allclose(transition.log_prob(x_s), expected, atol=1e-12)


def test_log_prob_of_half_precision_is_computed_in_float32():
    transition = Gaussian(torch.zeros(1, 4, 32, 32, dtype=torch.bfloat16), torch.tensor(0.01, dtype=torch.bfloat16))
    assert transition.log_prob(torch.zeros(1, 4, 32, 32)).dtype == torch.float32


def test_a_deterministic_step_has_no_density():
    transition = Gaussian(torch.zeros(2, 1, 2, 2), torch.tensor(0.0))
    assert transition.log_prob(torch.zeros(2, 1, 2, 2)).isnan().all()


def test_kl_equals_its_monte_carlo_estimate():
    p = Gaussian(randn(1, 2, 2, 2), torch.tensor(0.5, dtype=torch.float64))
    q = Gaussian(p.mean + 0.3, p.std)
    draws = p.mean + 0.5 * randn(40_000, 2, 2, 2, seed=3)
    log_ratio = Gaussian(p.mean.expand_as(draws), p.std).log_prob(draws) - Gaussian(
        q.mean.expand_as(draws), q.std
    ).log_prob(draws)
    assert p.kl(q).item() == pytest.approx(log_ratio.mean().item(), rel=0.02)


# Gaussian data N(m, S) has a closed-form predictor: E[x_0 | x_t] = m + alpha S / (alpha² S + sigma²) (x_t - alpha m).
M, S = 0.8, 0.25


def predictor(x_t, node: Node):
    variance = node.alpha**2 * S + node.sigma**2
    x0_hat = M + node.alpha * S / variance * (x_t - node.alpha * M)
    return x0_hat, (x_t - node.alpha * x0_hat) / node.sigma


def uniform_grid(num_steps, lowest=0.05, highest=0.9):
    """Nodes even in time on a cosine schedule, far enough from both ends for first-order steps."""
    angle = torch.linspace(highest, lowest, num_steps + 1, dtype=torch.float64) * math.pi / 2
    return Grid(angle.cos(), angle.sin(), torch.arange(num_steps, -1, -1))


def end_moments(kernel, grid):
    """Mean and variance at the data end, propagated exactly: every kernel here is affine in x_t for Gaussian data."""
    first = grid[0]
    mean, variance = first.alpha * M, first.alpha**2 * S + first.sigma**2
    for step in range(grid.num_steps):
        t, s = grid[step], grid[step + 1]
        at = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None, None, None]
        transition = kernel(*predictor(at, t), t, s)
        offset, slope = transition.mean[0].item(), (transition.mean[1] - transition.mean[0]).item()
        mean, variance = slope * mean + offset, slope**2 * variance + transition.std**2
    return mean, variance


@pytest.mark.parametrize("eta", [0.0, pytest.param(0.5, marks=pytest.mark.slow), 1.0])
@pytest.mark.parametrize("rule", [Ddim, EulerMaruyama])
def test_marginals_are_kept_in_the_limit_of_small_steps(rule, eta):
    grid = uniform_grid(4000)
    last = grid[grid.num_steps]
    mean, variance = end_moments(rule(eta), grid)
    assert mean.item() == pytest.approx((last.alpha * M).item(), abs=2e-3)
    assert variance.item() == pytest.approx((last.alpha**2 * S + last.sigma**2).item(), abs=2e-3)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("rule", [Ddim, EulerMaruyama])
def test_end_moments_converge_with_order_one(rule, eta):
    last = uniform_grid(1)[1]
    exact = (last.alpha**2 * S + last.sigma**2).item()
    errors = [abs(end_moments(rule(eta), uniform_grid(n))[1].item() - exact) for n in (100, 200, 400)]
    slopes = [math.log2(errors[0] / errors[1]), math.log2(errors[1] / errors[2])]
    assert slopes == pytest.approx([1.0, 1.0], abs=0.3)


def test_euler_maruyama_converges_strongly_on_one_brownian_path():
    fine = 4096
    noise = randn(fine, 512, 1, 1, 1, seed=5)
    start = randn(512, 1, 1, 1, seed=6)

    def end(num_steps):
        grid, stride = uniform_grid(num_steps), fine // num_steps
        x_t = start
        for step in range(num_steps):
            brownian = noise[step * stride : (step + 1) * stride].sum(0) / math.sqrt(stride)
            transition = euler_maruyama(*predictor(x_t, grid[step]), grid[step], grid[step + 1], eta=1.0)
            x_t = transition.sample(brownian)
        return x_t

    exact = end(fine)
    errors = [(end(n) - exact).abs().mean().item() for n in (32, 64, 128)]
    slopes = [math.log2(errors[0] / errors[1]), math.log2(errors[1] / errors[2])]
    # g depends on time only, so Euler-Maruyama has strong order 1.
    assert slopes == pytest.approx([1.0, 1.0], abs=0.3)


def test_kernel_kl_tends_to_half_variance_times_squared_score_change():
    change = 0.3
    ratios = []
    for num_steps in (50, 100, 200):
        grid = uniform_grid(num_steps)
        t, s = grid[num_steps // 2], grid[num_steps // 2 + 1]
        x_t = randn(1, 1, 1, 1)
        policy_eps = predictor(x_t, t)[1]
        reference_eps = policy_eps + change
        policy, reference = (
            ddim((x_t - t.sigma * eps) / t.alpha, eps, t, s, eta=1.0) for eps in (policy_eps, reference_eps)
        )
        running = 0.5 * added_variance(t, s) * (change / t.sigma) ** 2
        ratios.append((policy.kl(reference) / running).item() - 1)
    assert abs(ratios[2]) < 0.05
    assert ratios[1] / ratios[2] == pytest.approx(2.0, abs=0.3)


def test_nodes_may_differ_per_sample():
    grid = uniform_grid(10)
    x_t = randn(2, 1, 2, 2)
    picked = torch.tensor([2, 7])
    t = Node(grid.alpha[picked][:, None, None, None], grid.sigma[picked][:, None, None, None], picked)
    s = Node(grid.alpha[picked + 1][:, None, None, None], grid.sigma[picked + 1][:, None, None, None], picked)
    both = ddim(*predictor(x_t, t), t, s, eta=1.0)
    for row, step in enumerate((2, 7)):
        single = ddim(*predictor(x_t[row : row + 1], grid[step]), grid[step], grid[step + 1], eta=1.0)
        assert torch.equal(both.mean[row : row + 1], single.mean)
        assert torch.equal(both.log_prob(x_t)[row : row + 1], single.log_prob(x_t[row : row + 1]))


def test_the_drift_of_an_euler_maruyama_step_is_the_integral_of_f_over_it():
    """Of rectified flow from t = 0.7 to s = 0.4: ∫1/(1 - t) = log 2, whatever the step's length; without a score."""
    t, s = (Node(torch.tensor(1 - time), torch.tensor(time), torch.tensor(1000 * time)) for time in (0.7, 0.4))
    x0_hat = torch.ones(1, 4, 2, 2)
    mean = euler_maruyama(x0_hat, torch.zeros_like(x0_hat), t, s, eta=1.0).mean
    assert torch.allclose(mean, torch.full_like(mean, 0.3 * (1 + math.log(2))))


def test_the_kl_of_half_precision_is_computed_in_float32():
    ones = torch.ones(1, 4, 8, 8, dtype=torch.float16)
    policy, other = (Gaussian(mean, torch.tensor(0.03125, dtype=torch.float16)) for mean in (1.5 * ones, ones))
    assert policy.kl(other).tolist() == [0.5 * 256 * 16**2]
    wider = Gaussian(10 * ones, policy.std)
    assert wider.kl(other).tolist() == [0.5 * 256 * 288**2]  # float16 ends at 65,504
