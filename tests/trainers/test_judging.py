"""What the steps of a rollout are worth: costs that nothing gets lost of, V where it is needed, advantages."""

import pytest
import torch
from diffusers import DDIMScheduler
from rpo.trainers.online_config import LearningConfig, RolloutConfig
from rpo.trainers.rollouts.judging import advantages, judge, trained_points
from rpo.trainers.rollouts.moments import step_cost, transition_of
from rpo.trainers.rollouts.points import points_of
from torch import nn

from rpo.objectives.advantages import gae, return_minus_value, value_difference
from rpo.process.transition import Ddim
from rpo.trainers.score_as_action_config import ValueConfig
from rpo.trainers.value.inputs import ValuePoints
from tests.tiny import tiny_sd
from tests.trainers.online_runs import lightness, score_as_action
from tests.trainers.test_moments import close, moved

NUM_STEPS = 6
ROLLOUT = RolloutConfig(prompts=2, images_per_prompt=2, num_steps=NUM_STEPS, guidance_scale=2.0)
MIDDLE = LearningConfig(micro_batch=4, window=(1 / NUM_STEPS, 4 / NUM_STEPS))
"""Steps 1, 2 and 3."""


def made(folder, **changes):
    defaults = {"rollout": ROLLOUT, "kl_weight": 0.5, "normalize": "none", "reward": lightness, "advantage": "gae"}
    return moved(score_as_action(folder, **defaults | changes))


def judged_by(trainer):
    rollout = trainer.run.draw(0)
    return judge(
        rollout,
        trainer.run.steps,
        trainer.run.policy,
        trainer.critic,
        trainer.config,
        guidance_scale=trainer.run.guidance_scale,
        batch_size=5,
    )


def every_step(rollout):
    steps = torch.arange(NUM_STEPS)[:, None].expand(-1, rollout.num_images)
    return points_of(rollout, steps, 1.0, is_frozen=False)


@pytest.mark.parametrize("estimator", ["likelihood", "likelihood_state_cost"])
def test_costs_are_those_of_every_step(tmp_path, estimator):
    judged = judged_by(made(tmp_path, estimator=estimator))
    points, model = every_step(judged.rollout), made(tmp_path).run.model
    reference = judged.references.flatten(0, 1)
    if estimator == "likelihood":
        old = transition_of(model, reference, points, Ddim(1.0)).log_prob(points.x_s)
        expected = points.log_prob - old
        assert expected.min() < 0  # by sample: a mean of which is the KL
    else:
        expected = step_cost(model, points.prediction, reference, points, Ddim(1.0))
        assert expected.min() > 0
    assert torch.allclose(judged.costs.flatten(), 0.5 * expected, rtol=1e-4, atol=1e-4)
    assert judged.first == 0
    assert judged.values.shape == (NUM_STEPS + 1, 4)
    assert torch.equal(judged.values[-1], judged.rollout.rewards)


def test_what_follows_the_trained_part_is_one_long_step_with_all_its_costs(tmp_path):
    whole = judged_by(made(tmp_path, estimator="likelihood_state_cost"))
    part = judged_by(made(tmp_path, estimator="likelihood_state_cost", learning=MIDDLE))
    assert part.first == 1
    assert close(part.costs[:3], whole.costs[1:4])
    assert close(part.costs[3], whole.costs[4:].sum(dim=0))
    assert close(part.values, whole.values[[1, 2, 3, 4, 6]])


@pytest.mark.parametrize("estimator", ["likelihood", "likelihood_state_cost"])
def test_a_step_to_perfectly_clean_data_costs_nothing(tmp_path, estimator):
    """It adds no noise, so that it has no KL."""
    pipe = tiny_sd()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True)
    costs = judged_by(made(tmp_path, pipe=pipe, estimator=estimator)).costs
    assert (costs[:-1] != 0).all()
    assert costs[-1].tolist() == [0.0] * 4


def test_without_weight_there_is_no_cost_and_no_reference(tmp_path):
    judged = judged_by(made(tmp_path, kl_weight=0.0))
    assert judged.costs.tolist() == [[0.0] * 4] * NUM_STEPS
    assert judged.references is None


def test_advantages_are_those_of_their_names(tmp_path):
    trainers = {
        name: made(tmp_path, advantage=name, trace=0.7)
        for name in ("gae", "value_difference", "return_minus_value", "group")
    }
    judged = judged_by(trainers["gae"])
    found = {name: advantages(judged, trainer.config) for name, trainer in trainers.items()}
    assert torch.equal(found["gae"], gae(judged.values, judged.costs, trace=0.7))
    assert torch.equal(found["value_difference"], value_difference(judged.values, judged.costs))
    assert torch.equal(found["return_minus_value"], return_minus_value(judged.values, judged.costs))
    others = judged.rollout.rewards[[1, 0, 3, 2]]
    expected = judged.rollout.rewards - judged.costs.flip(0).cumsum(0).flip(0) - others
    assert torch.allclose(found["group"], expected, atol=1e-6)


def test_points_have_the_advantage_of_their_own_step(tmp_path):
    trainer = made(tmp_path, learning=MIDDLE)
    judged = judged_by(trainer)
    points = trained_points(judged, trainer.run, trainer.critic, trainer.config)
    worth = advantages(judged, trainer.config)
    for row, (step, image) in enumerate(zip(points.step.tolist(), points.image.tolist(), strict=True)):
        assert points.advantage[row] == worth[step - 1, image]
        assert torch.equal(points.reference[row], judged.references[step, image])


@pytest.mark.parametrize("normalize", ["none", "batch", "per_step"])
def test_what_scales_an_advantage_scales_its_cost(tmp_path, normalize):
    trainer = made(tmp_path, normalize=normalize, estimator="likelihood_state_cost", max_advantage=None)
    judged = judged_by(trainer)
    points = trained_points(judged, trainer.run, trainer.critic, trainer.config)
    worth = advantages(judged, trainer.config)
    if normalize == "per_step":
        worth = worth - worth.mean(dim=1, keepdim=True)
    unscaled = points.advantage * trainer.config.kl_weight / points.cost_weight
    assert torch.allclose(unscaled.view(NUM_STEPS, 4), worth, rtol=1e-3, atol=1e-5)


def test_a_batch_is_divided_by_the_spread_of_all_its_steps(tmp_path):
    trainer = made(tmp_path, normalize="batch", max_advantage=None)
    judged = judged_by(trainer)
    points = trained_points(judged, trainer.run, trainer.critic, trainer.config)
    worth = advantages(judged, trainer.config)
    assert torch.allclose(points.advantage.view(NUM_STEPS, 4), worth / worth.flatten().std(), rtol=1e-4)


def test_at_the_data_end_the_value_is_what_was_earned_whatever_the_design(tmp_path):
    judged = judged_by(made(tmp_path, value=ValueConfig(design="none", channels=8)))
    assert torch.equal(judged.values[-1], judged.rollout.rewards)
    assert not torch.allclose(judged.values[0], judged.rollout.rewards)


def test_advantages_are_cut_where_told_once_they_are_scaled(tmp_path):
    trainer = made(tmp_path, normalize="batch", max_advantage=0.5)
    points = trained_points(judged_by(trainer), trainer.run, trainer.critic, trainer.config)
    assert points.advantage.abs().max() == 0.5


def test_a_group_of_one_has_nobody_to_be_compared_with(tmp_path):
    alone = RolloutConfig(prompts=2, images_per_prompt=1, num_steps=NUM_STEPS, guidance_scale=2.0)
    trainer = made(tmp_path, rollout=alone, advantage="group")
    with pytest.raises(ValueError, match="with one image per prompt, .*; give rollout.images_per_prompt of 2 or more"):
        advantages(judged_by(trainer), trainer.config)


class Nothing(nn.Module):
    """F = 0: V is what the reward says."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, points):
        return self.weight * points.time


@pytest.mark.parametrize("branch", ["differentiable", "frozen"])
def test_the_slope_of_v_goes_through_decoder_and_reward(tmp_path, branch):
    """Of a plain function as reward, which is asked unchecked for that."""
    value = ValueConfig(design="linear", branch=branch, channels=8)
    trainer = made(tmp_path, value=value)
    trainer.critic.network = Nothing()
    x0_hat = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    embeds = torch.zeros(2, 1, 1)
    points = ValuePoints(x0_hat.detach(), x0_hat, torch.full((2,), 0.25), embeds, ("a", "b"), baseline=torch.zeros(2))
    found = trainer.critic(points)
    expected = 0.75 * lightness(trainer.run.model.decode(x0_hat), ("a", "b"))
    assert torch.allclose(found, expected)
    (wanted,) = torch.autograd.grad(expected.sum(), x0_hat)
    assert wanted.abs().max() > 0
    if branch == "frozen":
        assert torch.autograd.grad(found.sum(), x0_hat, allow_unused=True)[0] is None
    else:
        assert close(torch.autograd.grad(found.sum(), x0_hat)[0], wanted)
