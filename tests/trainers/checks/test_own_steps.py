"""The pipeline's own steps, asked of its own call: those of the grid for every family, and the pipeline as it was."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from rpo.models.checkpoint import Checkpoint
from rpo.trainers.checks.own_steps import own_sigmas
from rpo.types import Canvas
from tests.contracts.families import VARIANTS, mostly
from tests.tiny import tiny_sd

pytestmark = pytest.mark.filterwarnings("ignore:the network denoises no better")


def apart(model, num_steps, canvas):
    grid = model.grid(num_steps, canvas)
    return (own_sigmas(model.pipe, num_steps, canvas, beside=grid) - grid.sigma[:-1].float()).abs().max()


@pytest.mark.parametrize("variant", mostly(VARIANTS))
def test_the_grid_has_them_at_any_size_and_number_and_the_scheduler_is_left_alone(variant):
    pipe = VARIANTS[variant]()
    model, kept = Checkpoint(pipe), pipe.scheduler
    before = torch.as_tensor(kept.timesteps).clone()
    for num_steps, canvas in ((4, Canvas(64, 64)), (7, Canvas(64, 96))):
        assert apart(model, num_steps, canvas) < 1e-6
    assert pipe.scheduler is kept and torch.equal(torch.as_tensor(kept.timesteps), before)
    assert model.predict(torch.randn(1, *model.latent_shape()), torch.tensor([500]), model.encode_prompts(["a"])).any()


def test_another_schedule_is_seen_and_another_sampler_of_the_same_is_not_blamed_for_its_steps():
    pipe = tiny_sd()
    model = Checkpoint(pipe)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    assert apart(model, 10, model.canvas) < 1e-6
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    assert apart(model, 10, model.canvas) > 1e-3
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, beta_schedule="linear")
    assert apart(model, 10, model.canvas) > 1e-2
