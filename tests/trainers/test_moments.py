"""What is asked of the denoiser about a rollout: the same whether it was kept or is computed again."""

from dataclasses import replace

import pytest
import torch
from rpo.trainers.online_config import LearningConfig
from rpo.trainers.rollouts.moments import (
    current_prediction,
    measured_kl,
    others_mean,
    reference_prediction,
    step_cost,
    transition_of,
    value_gradient,
    value_nodes,
)
from rpo.trainers.rollouts.points import points_of

from rpo.models.base import guided
from rpo.process.continuous import running_cost
from rpo.process.prediction import to_x0_eps
from rpo.process.transition import Ddim
from rpo.sampling.sample import Keep
from rpo.trainers.grpo import loss as grpo_loss
from tests.trainers.online_runs import LEARNING, ROLLOUT, grpo, score_as_action

KERNEL = Ddim(1.0)


def moved(trainer):
    """The trainer with an adapter that does something."""
    with torch.no_grad():
        for index, parameter in enumerate(trainer.run.policy.parameters):
            generator = torch.Generator().manual_seed(index)
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return trainer


def all_points(trainer):
    return trainer.run.points(trainer.run.draw(0))


def slope(trainer, value):
    found = torch.autograd.grad(value.square().sum(), trainer.run.policy.parameters)
    return torch.cat([one.flatten() for one in found])


def close(found, expected):
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("freeze_negative", [True, False])
def test_the_graph_of_the_rollout_is_that_of_computing_it_again(tmp_path, freeze_negative):
    learning = LearningConfig(keep_graph=True, freeze_negative=freeze_negative)
    trainer = moved(grpo(tmp_path, learning=learning, rollout=replace(ROLLOUT, batch_size=2)))
    points = trainer.prepare(0)
    parts = list(trainer.run.live(points))
    assert sum(map(len, parts)) == len(points)
    for part in parts:
        assert part.live is not None
        again = current_prediction(trainer.run.model, replace(part, live=None), trainer.run.guidance_scale)
        assert close(part.live, again)
        assert torch.equal(part.live, part.prediction)
        assert close(slope(trainer, part.live), slope(trainer, again))


def test_the_negative_branch_of_the_rollout_replaces_computing_it(tmp_path):
    trainer = moved(grpo(tmp_path, learning=replace(LEARNING, freeze_negative=True)))
    run = trainer.run
    points = all_points(trainer)
    x_t, timestep, cond = points.x_t, points.t.timestep.flatten(), points.conditioning
    prompt_pred = run.model.predict(x_t, timestep, cond, 1.0)
    with torch.no_grad():
        negative_pred = run.model.predict(x_t, timestep, cond.only_negative(), 1.0)
    assert close(points.negative, negative_pred)
    found = current_prediction(run.model, points, run.guidance_scale)
    expected = guided(negative_pred, prompt_pred, run.guidance_scale)
    assert close(found, expected)
    assert close(slope(trainer, found), slope(trainer, expected))
    whole = current_prediction(run.model, replace(points, negative=None), run.guidance_scale)
    assert close(found, whole)
    assert not close(slope(trainer, current_prediction(run.model, points, 2.0)), slope(trainer, whole))


def test_unchanged_policy_has_ratio_1(tmp_path):
    trainer = moved(grpo(tmp_path))
    points = all_points(trainer)
    again = current_prediction(trainer.run.model, points, trainer.run.guidance_scale)
    log_prob = transition_of(trainer.run.model, again, points, KERNEL).log_prob(points.x_s)
    assert torch.allclose(log_prob, points.log_prob, rtol=1e-4, atol=0.05)
    exact = transition_of(trainer.run.model, points.prediction, points, KERNEL).log_prob(points.x_s)
    assert torch.allclose(exact, points.log_prob, rtol=1e-6)


def test_the_reference_is_the_policy_at_the_start_in_any_batches(tmp_path):
    trainer = grpo(tmp_path)
    points = all_points(trainer)
    fresh = reference_prediction(trainer.run.policy, points, 2.0, batch_size=100)
    assert close(fresh, points.prediction)
    moved(trainer)
    assert close(reference_prediction(trainer.run.policy, points, 2.0, batch_size=5), fresh)
    assert not close(current_prediction(trainer.run.model, points, 2.0), fresh)
    assert not fresh.requires_grad


def test_a_step_costs_its_kl_and_that_of_an_ode_its_running_cost(tmp_path):
    trainer = moved(grpo(tmp_path))
    model, points = trainer.run.model, all_points(trainer)
    reference = reference_prediction(trainer.run.policy, points, 2.0, batch_size=100)
    policy, old = (transition_of(model, pred, points, KERNEL) for pred in (points.prediction, reference))
    expected = 0.5 * ((policy.mean - old.mean) ** 2 / policy.std**2).sum(dim=(1, 2, 3))
    assert torch.allclose(step_cost(model, points.prediction, reference, points, KERNEL), expected, rtol=1e-5)
    eps = [to_x0_eps(pred, points.x_t, points.t, "epsilon")[1] for pred in (points.prediction, reference)]
    found = step_cost(model, points.prediction, reference, points, Ddim(0.0))
    assert torch.allclose(found, running_cost(*eps, points.t, points.s, eta=0.0))
    assert (step_cost(model, reference, reference, points, KERNEL) == 0).all()


def kl_of_paths(trainer, rollout):
    """Step by step, summed over each path; mean over the images."""
    trainer.run.rollout, every = rollout, torch.arange(3)[:, None].expand(-1, rollout.num_images)
    points, policy = points_of(rollout, every, 1.0, is_frozen=False), trainer.run.policy
    reference = reference_prediction(policy, points, 2.0, batch_size=3)
    return step_cost(trainer.run.model, points.prediction, reference, points, KERNEL).view(3, -1).sum(dim=0).mean()


def test_the_kl_that_is_measured_is_that_of_whole_paths(tmp_path, monkeypatch):
    trainer = moved(grpo(tmp_path))
    alone = trainer.run.processes
    few, rollout = (trainer.run.rollouts.draw(index, lambda _: Keep(predictions=True)) for index in (1, 2))
    sums = [measured_kl(trainer.run.policy, few, KERNEL, 2.0, batch_size=3, processes=alone)]
    assert 0 < sums[0] < 3 * kl_of_paths(trainer, few)
    monkeypatch.setattr("rpo.trainers.rollouts.moments.KL_STRIDE", 1)
    found = measured_kl(trainer.run.policy, rollout, KERNEL, 2.0, batch_size=3, processes=alone)
    assert torch.allclose(found, kl_of_paths(trainer, rollout), rtol=1e-4)


def test_every_so_often_each_moment_is_measured_once(tmp_path):
    """Over as many rollouts as the stride says, also where there are fewer moments than that."""
    trainer = moved(grpo(tmp_path, rollout=replace(ROLLOUT, prompts=1)))
    rollout = trainer.run.rollouts.draw(0, lambda _: Keep(predictions=True))
    turns = [
        measured_kl(
            trainer.run.policy,
            replace(rollout, index=index),
            KERNEL,
            2.0,
            batch_size=3,
            processes=trainer.run.processes,
        )
        for index in range(6)
    ]
    assert torch.allclose(torch.stack(turns).mean(), kl_of_paths(trainer, rollout), rtol=1e-4)


def test_the_kl_of_a_loss_is_that_of_whole_paths(tmp_path):
    trainer = moved(grpo(tmp_path, kl_weight=0.1))
    points = trainer.prepare(0)
    facts = grpo_loss(points, policy=trainer.run.policy, config=trainer.config, guidance_scale=2.0).metrics
    assert trainer.run.trained_steps == 3
    assert torch.allclose(facts["policy/kl"], kl_of_paths(trainer, trainer.run.rollout), rtol=1e-4)


def told_to_the_end(rollout):
    """The rollout of a checkpoint whose network is still told a timestep where the image is read."""
    grid = rollout.trajectory.grid
    timestep = torch.cat([grid.timestep[:-1], grid.timestep[-1:] + 20])
    return replace(rollout, trajectory=replace(rollout.trajectory, grid=replace(grid, timestep=timestep)))


def test_nodes_of_a_value(tmp_path):
    trainer = grpo(tmp_path)
    rollout = told_to_the_end(trainer.run.draw(0))
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


class Curved:
    """A value that depends on both latents."""

    def __call__(self, points):
        return (points.x_t.sin() + points.x0_hat**2).sum(dim=(1, 2, 3)) * (1 + points.time)


@pytest.mark.parametrize("through_denoiser", [True, False])
def test_the_slope_of_v_is_its_slope_where_the_step_led(tmp_path, through_denoiser):
    """Against a difference along a random direction; cut off from the denoiser, the noise in x0_hat stays."""
    trainer = score_as_action(tmp_path)
    model, rollout = trainer.run.model, told_to_the_end(trainer.run.draw(0))
    points = trainer.run.points(rollout)
    settings = {"guidance_scale": 2.0, "through_denoiser": through_denoiser}
    found = value_gradient(model, Curved(), rollout, points, batch_size=5, **settings)
    direction = torch.randn(points.x_s.shape, generator=torch.Generator().manual_seed(0))
    is_data = points.step == rollout.trajectory.grid.num_steps - 1
    following = (points.step + 1).clamp(max=rollout.trajectory.grid.num_steps - 1)
    kept = rollout.trajectory.predictions[following, points.image]

    @torch.no_grad()
    def value(x_s):
        cond = points.conditioning
        prediction = model.predict(x_s, points.s.timestep.flatten(), cond, 2.0) if through_denoiser else kept
        x0_hat, _ = to_x0_eps(prediction, x_s, points.s, "epsilon")
        x0_hat = torch.where(is_data[:, None, None, None], x_s, x0_hat)
        time = torch.where(is_data, 0.0, points.s.timestep.flatten() / 1000)
        return (x_s.double().sin() + x0_hat.double() ** 2).sum(dim=(1, 2, 3)) * (1 + time)

    h = 1e-2
    expected = (value(points.x_s + h * direction) - value(points.x_s - h * direction)) / (2 * h)
    along = (found * direction).sum(dim=(1, 2, 3))
    assert torch.allclose(along.double(), expected, rtol=0.02, atol=0.02 * expected.abs().max().item())
    at_data = points.x_s[is_data]
    assert torch.allclose(found[is_data], at_data.cos() + 2 * at_data, rtol=1e-5, atol=1e-5)  # x0_hat is x_s there
    whole = value_gradient(model, Curved(), rollout, points, batch_size=100, **settings)
    assert close(found, whole)
