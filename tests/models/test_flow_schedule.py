"""The schedule of a flow checkpoint is its scheduler's, whichever of diffusers' that is."""

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from rpo.models.schedules import FlowSchedule, even_sigmas

TOKENS = 640
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


def mu(tokens):
    """Linear from 0.5 at 256 tokens to 1.15 at 4096."""
    return 0.5 + 0.65 * (tokens - 256) / (4096 - 256)


def shifted(sigma, shift):
    return shift * sigma / (1 + (shift - 1) * sigma)


SCHEDULERS = {
    "a fixed shift": (FlowMatchEulerDiscreteScheduler(shift=3.0), {}, 3.0),
    "a shift by size": (FlowMatchEulerDiscreteScheduler(**DYNAMIC), {"mu": mu(TOKENS)}, math.exp(mu(TOKENS))),
    "a linear shift by size": (
        FlowMatchEulerDiscreteScheduler(**DYNAMIC, time_shift_type="linear"),
        {"mu": mu(TOKENS)},
        mu(TOKENS),
    ),
    "UniPC": (
        UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"),
        {},
        3.0,
    ),
    "DPM-Solver++": (DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=2.0), {}, 2.0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_grid_is_the_scheduler_s_and_the_shift_is_the_one_that_makes_it(name):
    scheduler, options, shift = SCHEDULERS[name]
    schedule = FlowSchedule(scheduler)
    grid = schedule.grid(7, TOKENS)
    made = type(scheduler).from_config(scheduler.config)
    made.set_timesteps(7, **options)
    assert torch.equal(grid.sigma.float(), made.sigmas.float())
    assert schedule.shift(7, TOKENS) == pytest.approx(shift)
    sigma = grid.sigma[:-1].double()
    unshifted = sigma / (shift - (shift - 1) * sigma)
    assert torch.allclose(unshifted.diff(), unshifted.diff().mean(), atol=2e-4)


def test_sigmas_and_shift_of_the_pipeline_s_own():
    scheduler = FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    schedule = FlowSchedule(scheduler, sigmas=even_sigmas, mu=lambda steps, tokens: steps / tokens)
    expected = shifted(torch.tensor(even_sigmas(5)), math.exp(5 / TOKENS))
    assert torch.allclose(schedule.grid(5, TOKENS).sigma[:-1].float(), expected, atol=1e-6)
    assert schedule.shift(5, TOKENS) == pytest.approx(math.exp(5 / TOKENS))
