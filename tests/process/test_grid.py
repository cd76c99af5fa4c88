"""Grids run from noise to data, agree with diffusers, and refuse what does not."""

import pytest
import torch

from rpo.process.grid import flow_grid, vp_grid, vp_node
from tests.tiny import tiny_scheduler


def test_vp_grid_has_the_schedule_s_values_and_ends_at_its_final_alpha():
    scheduler = tiny_scheduler()
    scheduler.set_timesteps(10)
    grid = vp_grid(scheduler.alphas_cumprod, scheduler.timesteps, float(scheduler.final_alpha_cumprod))
    assert grid.num_steps == 10
    assert grid.alpha.dtype == torch.float32
    expected = scheduler.alphas_cumprod[scheduler.timesteps]
    assert torch.allclose(grid.alpha[:-1] ** 2, expected, atol=1e-6)
    assert torch.allclose(grid.alpha**2 + grid.sigma**2, torch.ones(11), atol=1e-6)
    assert grid.alpha[-1].item() ** 2 == pytest.approx(scheduler.alphas_cumprod[0].item(), abs=1e-6)


def test_vp_node_indexes_per_sample():
    abar = tiny_scheduler().alphas_cumprod
    node = vp_node(abar, torch.tensor([0, 999, 500]))
    assert node.alpha.shape == (3, 1, 1, 1)
    assert torch.allclose(node.alpha.flatten() ** 2, abar[[0, 999, 500]], atol=1e-6)
    assert torch.allclose(node.sigma.flatten() ** 2, 1 - abar[[0, 999, 500]], atol=1e-6)


def test_zero_terminal_snr_is_a_grid_too():
    scheduler = tiny_scheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    grid = vp_grid(scheduler.alphas_cumprod, scheduler.timesteps, float(scheduler.final_alpha_cumprod))
    assert grid.alpha[0].item() < 1e-6


def test_flow_grid():
    grid = flow_grid(torch.tensor([1.0, 0.5, 0.0]))
    assert grid.alpha.tolist() == [0.0, 0.5, 1.0]
    assert grid.timestep.tolist() == [1000.0, 500.0, 0.0]


@pytest.mark.parametrize("timesteps", [[1, 501, 901], [901, 901, 1]], ids=["data to noise", "repeated"])
def test_a_grid_that_does_not_fall_is_refused(timesteps):
    abar = tiny_scheduler().alphas_cumprod
    with pytest.raises(ValueError, match="must run from noise to data.*at step 0.*noisiest first"):
        vp_grid(abar, torch.tensor(timesteps), float(abar[0]))


def test_a_grid_without_a_step_is_refused():
    abar = tiny_scheduler().alphas_cumprod
    with pytest.raises(ValueError, match="has 1 nodes, but a step needs two"):
        vp_grid(abar, torch.tensor([], dtype=torch.long), float(abar[0]))
