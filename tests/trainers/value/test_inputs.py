"""What a value sees of a rollout, and its slope where a step led."""

import math
from dataclasses import replace

import pytest
import torch

from rpo.process.prediction import to_x0_eps
from rpo.trainers.value.inputs import compared_with_others, others_mean, value_gradient, value_nodes
from tests.trainers.online_runs import close, grpo, score_as_action


def told_to_the_end(rollout):
    """The rollout of a checkpoint whose network is still told a timestep where the image is read."""
    grid = rollout.trajectory.grid
    timestep = torch.cat([grid.timestep[:-1], grid.timestep[-1:] + 20])
    return replace(rollout, trajectory=replace(rollout.trajectory, grid=replace(grid, timestep=timestep)))


def test_nodes_of_a_value(tmp_path):
    trainer = grpo(tmp_path)
    rollout = told_to_the_end(trainer.algorithm.collector.draw(0))
    trajectory, model = rollout.trajectory, trainer.run.model
    nodes = value_nodes(model, rollout, [1, 3])
    assert torch.equal(nodes.x_t, trajectory.latents[[1, 3]].flatten(0, 1))
    x0_hat, _ = to_x0_eps(trajectory.predictions[1], trajectory.latents[1], trajectory.grid[1], "epsilon")
    assert torch.equal(nodes.x0_hat[:4], x0_hat)
    assert torch.equal(nodes.x0_hat[4:], trajectory.x_0)  # at the data end it is the image itself
    assert nodes.time.tolist() == pytest.approx([trajectory.grid.timestep[1].item() / 1000] * 4 + [0.0] * 4)
    assert nodes.prompts == rollout.prompts * 2
    assert torch.equal(nodes.baseline, others_mean(rollout.rewards, rollout.group).repeat(2))


def test_the_mean_of_the_others():
    rewards, group = torch.tensor([1.0, 3.0, 8.0, 10.0, 5.0]), torch.tensor([0, 0, 0, 1, 1])
    assert others_mean(rewards, group).tolist() == [5.5, 4.5, 2.0, 5.0, 10.0]
    assert others_mean(rewards, torch.tensor([0, 0, 0, 0, 1])) is None


def test_what_could_not_be_judged_is_in_no_mean_of_others():
    nan = math.nan
    rewards, group = torch.tensor([1.0, nan, 8.0, 10.0, nan, nan, nan]), torch.tensor([0, 0, 0, 1, 1, 2, 2])
    assert others_mean(rewards, group).nan_to_num(-1).tolist() == [8.0, 4.5, 1.0, -1, 10.0, -1, -1]
    assert compared_with_others(rewards, group).nan_to_num(-1).tolist() == [8.0, 4.5, 1.0, 10.0, 10.0, -1, -1]


class Curved:
    """A value that depends on both latents."""

    def __call__(self, points):
        return (points.x_t.sin() + points.x0_hat**2).sum(dim=(1, 2, 3)) * (1 + points.time)


def test_the_slope_of_v_is_its_slope_where_the_step_led(tmp_path):
    """Against a difference along a random direction."""
    trainer = score_as_action(tmp_path)
    model, rollout = trainer.run.model, told_to_the_end(trainer.algorithm.collector.draw(0))
    steps = trainer.algorithm.collector.steps(rollout)
    found = value_gradient(model, Curved(), rollout, steps, guidance_scale=2.0, batch_size=5)
    direction = torch.randn(steps.x_s.shape, generator=torch.Generator().manual_seed(0))
    is_data = steps.step == rollout.trajectory.grid.num_steps - 1

    @torch.no_grad()
    def value(x_s):
        cond = steps.conditioning
        prediction = model.predict(x_s, steps.s.timestep.flatten(), cond, 2.0)
        x0_hat, _ = to_x0_eps(prediction, x_s, steps.s, "epsilon")
        x0_hat = torch.where(is_data[:, None, None, None], x_s, x0_hat)
        time = torch.where(is_data, 0.0, steps.s.timestep.flatten() / 1000)
        return (x_s.double().sin() + x0_hat.double() ** 2).sum(dim=(1, 2, 3)) * (1 + time)

    h = 1e-2
    expected = (value(steps.x_s + h * direction) - value(steps.x_s - h * direction)) / (2 * h)
    along = (found * direction).sum(dim=(1, 2, 3))
    assert torch.allclose(along.double(), expected, rtol=0.02, atol=0.02 * expected.abs().max().item())
    at_data = steps.x_s[is_data]
    assert torch.allclose(found[is_data], at_data.cos() + 2 * at_data, rtol=1e-5, atol=1e-5)  # x0_hat is x_s there
    whole = value_gradient(model, Curved(), rollout, steps, guidance_scale=2.0, batch_size=100)
    assert close(found, whole)
