"""What the steps of a rollout are worth: costs that nothing gets lost of, V where it is needed, advantages."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from rpo.objectives.advantages import gae, normalize_per_step, return_minus_value, value_difference
from rpo.process.transition import Ddim
from rpo.trainers.rollouts.costs import step_cost
from rpo.trainers.rollouts.settings import RolloutConfig, StepsConfig
from rpo.trainers.rollouts.steps import all_steps_of, transition_by
from rpo.trainers.value.inputs import ValuePoints
from rpo.trainers.value.returns import advantages, path_returns, scaled
from rpo.trainers.value.settings import ValueConfig
from rpo.training.processes import Processes
from tests.marks import slow_but
from tests.tiny import tiny_sd
from tests.trainers.online_runs import VALUE, close, lightness, moved, score_as_action, small_value  # noqa: F401

NUM_STEPS = 6
ROLLOUT = RolloutConfig(prompts=2, images_per_prompt=2, num_steps=NUM_STEPS, guidance_scale=2.0)
MIDDLE = StepsConfig(window=(1 / NUM_STEPS, 4 / NUM_STEPS))
"""Steps 1, 2 and 3."""
ALL = torch.ones(4, dtype=torch.bool)
UNLEARNT = replace(VALUE, updates=0, pretrain_rollouts=0)


def made(folder, **changes):
    defaults = {"rollout": ROLLOUT, "kl_weight": 0.5, "normalize": "none", "reward": lightness, "advantage": "gae"}
    return moved(score_as_action(folder, **defaults | {"value": UNLEARNT} | changes))


def returns_of(trainer, costs=None):
    """Of rollout 0, whose steps cost these."""
    collector = trainer.algorithm.collector
    rollout = collector.draw(0)
    costs = torch.zeros(NUM_STEPS, 4) if costs is None else costs
    return path_returns(rollout, collector.chosen, costs, trainer.algorithm.value, trainer.run.model, batch_size=5)


def some_costs():
    return torch.rand(NUM_STEPS, 4, generator=torch.Generator().manual_seed(0))


# Costs: an image is worth what it earned more than its sibling, less the costs from a step on.


def charged(trainer):
    """What each step was charged, as its advantage tells, and all steps of the rollout."""
    steps = trainer.algorithm.collect(0)
    rollout = trainer.algorithm.collector.rollout
    advantage = steps["advantage"].view(-1, 4)
    following = rollout.rewards - rollout.rewards[[1, 0, 3, 2]]
    return torch.cat([advantage, following[None]]).diff(dim=0), all_steps_of(rollout)


@pytest.mark.parametrize("ends_clean", [False, True])
@pytest.mark.parametrize("estimator", ["likelihood", "likelihood_state_cost"])
def test_costs_are_those_of_every_step_and_a_step_to_clean_data_has_none(tmp_path, estimator, ends_clean):
    pipe = tiny_sd()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=ends_clean)
    trainer = made(tmp_path, pipe=pipe, estimator=estimator, advantage="group", kl_weight=50.0)
    found, steps = charged(trainer)
    steps = steps.select(torch.arange(found.numel()))  # without the step that adds no noise
    model, reference = trainer.run.model, trainer.algorithm.collector.reference(steps)
    if estimator == "likelihood":
        expected = steps["log_prob"] - transition_by(model, reference, steps, Ddim(1.0)).log_prob(steps.x_s)
        assert expected.min() < 0  # by sample: a mean of which is the KL
    else:
        expected = step_cost(model, steps["prediction"], reference, steps, Ddim(1.0))
        assert expected.min() > 0
    assert len(found) == NUM_STEPS - ends_clean
    assert torch.allclose(found.flatten(), 50 * expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item() * 50)


def test_without_weight_there_is_no_cost_and_no_reference(tmp_path):
    trainer = made(tmp_path, kl_weight=0.0, advantage="group")
    assert charged(trainer)[0].abs().max() < 1e-6
    assert "reference" not in trainer.algorithm.collect(0)


def test_what_follows_the_trained_part_is_one_long_step_with_all_its_costs(tmp_path):
    whole, part = (returns_of(made(tmp_path, steps=steps), some_costs()) for steps in (StepsConfig(), MIDDLE))
    assert (whole.first, part.first) == (0, 1)
    assert torch.equal(part.costs[:3], whole.costs[1:4])
    assert close(part.costs[3], whole.costs[4:].sum(dim=0))
    assert close(part.values, whole.values[[1, 2, 3, 4, 6]])


# Advantages.


def test_advantages_are_those_of_their_names(tmp_path):
    returns = returns_of(made(tmp_path), some_costs())
    given = returns.values, returns.costs
    assert torch.equal(advantages(returns, "gae", trace=0.7), gae(*given, trace=0.7))
    assert torch.equal(advantages(returns, "value_difference", trace=0.7), value_difference(*given))
    assert torch.equal(advantages(returns, "return_minus_value", trace=0.7), return_minus_value(*given))


def test_every_step_has_the_advantage_and_the_reference_of_its_own(tmp_path):
    trainer = made(tmp_path, steps=replace(MIDDLE, train_steps=2), kl_weight=1e-9, trace=0.7)
    steps = trainer.algorithm.collect(0)
    worth = advantages(returns_of(trainer), "gae", trace=0.7)
    expected = worth[steps.step - trainer.algorithm.collector.chosen.min(), steps.image]
    assert close(steps["advantage"], expected)
    assert close(steps["reference"], trainer.algorithm.collector.reference(steps))


@pytest.mark.parametrize("normalize", slow_but(("per_step",), ("none", "batch", "per_step")))
def test_what_scales_an_advantage_scales_its_cost(tmp_path, normalize):
    plain, steps = (made(tmp_path, normalize=how).algorithm.collect(0) for how in ("none", normalize))
    worth = plain["advantage"].view(NUM_STEPS, 4)
    if normalize == "per_step":
        worth = worth - worth.mean(dim=1, keepdim=True)
    unscaled = steps["advantage"] * 0.5 / steps["cost_weight"]
    assert torch.allclose(unscaled.view(NUM_STEPS, 4), worth, rtol=1e-3, atol=1e-5)


def test_scales_are_those_of_the_whole_or_of_a_step_and_what_stands_out_is_cut(monkeypatch):
    advantage = torch.randn(NUM_STEPS, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(scaled(advantage, "batch", Processes(), ALL)[0], advantage / advantage.std())
    assert torch.equal(scaled(advantage, "per_step", Processes(), ALL)[0], normalize_per_step(advantage))
    monkeypatch.setattr("rpo.trainers.value.returns.MAX_ADVANTAGE", 0.5)
    for how, largest in (("batch", 0.5), ("per_step", 0.5), ("none", advantage.abs().max())):
        assert scaled(advantage, how, Processes(), ALL)[0].abs().max() == largest


@pytest.mark.parametrize("how", ["none", "batch", "per_step"])
def test_images_that_could_not_be_judged_are_in_no_scale_and_worth_nothing(how):
    advantage = torch.randn(NUM_STEPS, 6, generator=torch.Generator().manual_seed(0))
    judged = torch.tensor([True, False, True, True, False, True])
    spoilt = advantage.clone()
    spoilt[:, 1], spoilt[-1, 4] = math.nan, math.nan  # V may be there where the reward is not
    found, scale = scaled(spoilt, how, Processes(), judged)
    expected, of_judged = scaled(advantage[:, judged], how, Processes(), ALL)
    assert torch.equal(found[:, judged], expected) and torch.equal(scale[:, judged], of_judged)
    assert not found[:, ~judged].any() and scale.isfinite().all()


@pytest.mark.parametrize("how", ["batch", "per_step"])
def test_advantages_that_do_not_differ_blow_up_no_cost(how):
    rounding = torch.tensor([0.0, 1e-9, -1e-9, 0.0]).expand(2, -1)
    advantage, scale = scaled(rounding, how, Processes(), ALL)
    assert scale.tolist() == [[1.0] * 4] * 2
    assert advantage.abs().max() < 0.2 if how == "per_step" else advantage.abs().max() < 1e-6


def test_the_value_is_of_the_size_that_is_drawn(tmp_path):
    rollout = replace(ROLLOUT, resolution=(128, 64))
    trainer = score_as_action(tmp_path, rollout=rollout, value=replace(VALUE, sees_latents=True))
    assert torch.isfinite(trainer.algorithm.collect(0)["advantage"]).all()


@pytest.mark.parametrize("uses_reward", [True, False])
def test_at_the_data_end_the_value_is_what_was_earned(tmp_path, uses_reward):
    returns = returns_of(made(tmp_path, value=replace(UNLEARNT, uses_reward=uses_reward)))
    assert torch.equal(returns.values[-1], returns.rollout.rewards)
    assert not torch.allclose(returns.values[0], returns.rollout.rewards)


def test_a_group_of_one_has_nobody_to_be_compared_with(tmp_path):
    with pytest.raises(ValueError, match=r"rollout\.images_per_prompt is 1"):
        made(tmp_path, rollout=replace(ROLLOUT, images_per_prompt=1), advantage="group")


class Nothing(nn.Module):
    """F = 0: V is what the reward says."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, points):
        return self.weight * points.time


def test_the_slope_of_v_goes_through_decoder_and_reward(tmp_path):
    """Of a plain function as reward, which is asked unchecked for that; only `pathwise` follows it."""
    x0_hat = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    embeds = torch.zeros(2, 1, 1)
    points = ValuePoints(x0_hat.detach(), x0_hat, torch.full((2,), 0.25), embeds, ("a", "b"), baseline=torch.zeros(2))
    for estimator, is_followed in (("pathwise", True), ("likelihood", False)):
        trainer = made(tmp_path, estimator=estimator, value=ValueConfig(sees_latents=True))
        trainer.algorithm.value.network = Nothing()
        found = trainer.algorithm.value(points)
        expected = math.cos(math.pi / 8) * lightness(trainer.run.model.decode(x0_hat), ("a", "b"))
        assert torch.allclose(found, expected)
        slope = torch.autograd.grad(found.sum(), x0_hat, allow_unused=True)[0]
        assert (slope is not None) == is_followed
        if is_followed:
            wanted = torch.autograd.grad(expected.sum(), x0_hat)[0]
            assert wanted.abs().max() > 0 and close(slope, wanted)
