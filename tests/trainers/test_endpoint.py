"""Moments noised afresh: what each is worth against the group and against a value, and where a bound is clipped."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from rpo.trainers.online_config import LearningConfig, RolloutConfig
from rpo.trainers.rollouts.moments import current_prediction, others_mean, transition_of
from rpo.trainers.rollouts.noised import _noised, judge_noised

from rpo.process.prediction import to_x0_eps
from rpo.process.transition import Ddim
from rpo.sampling.sample import predict_at
from rpo.trainers.score_as_action_config import ValueConfig
from rpo.training.log import read_metrics
from tests.tiny import tiny_sd
from tests.trainers.online_runs import lightness, score_as_action
from tests.trainers.test_moments import moved

ROLLOUT = RolloutConfig(prompts=2, images_per_prompt=2, num_steps=5, solver="dpm_solver", eta=0.0, guidance_scale=1.0)
LEARNING = LearningConfig(micro_batch=4, train_steps=2, window=(0.0, 0.8))
VALUE = ValueConfig(channels=8, updates=30, batch_size=8, pretrain_rollouts=0, reward_until=1.0)


def made(folder, **changes):
    defaults = {
        "estimator": "endpoint",
        "advantage": "group",
        "normalize": "none",
        "rollout": ROLLOUT,
        "learning": LEARNING,
        "value": VALUE,
        "reward": lightness,
    }
    return moved(score_as_action(folder, **defaults | changes))


def judged_by(trainer):
    rollout = trainer.run.draw(0)
    return rollout, judge_noised(rollout, trainer.run, trainer.critic, trainer.config)


def test_without_a_value_an_image_is_worth_more_than_the_others_of_its_prompt(tmp_path):
    rollout, judged = judged_by(made(tmp_path))
    points = judged.points
    assert len(points) == 2 * 4
    expected = rollout.rewards - others_mean(rollout.rewards, rollout.group)
    assert torch.allclose(points.advantage, expected[points.image])
    assert judged.nodes is None


def test_with_a_value_each_moment_is_worth_what_the_value_did_not_expect(tmp_path):
    trainer = made(tmp_path, advantage="return_minus_value")
    rollout, judged = judged_by(trainer)
    points, nodes = judged.points, judged.nodes
    assert torch.equal(judged.returns, rollout.rewards[points.image])
    assert torch.allclose(points.advantage, judged.returns - trainer.critic.evaluate(nodes, batch_size=8))
    prediction = trainer.run.model.predict(points.x_t, points.t.timestep.flatten(), points.conditioning)
    x0_hat, _ = to_x0_eps(prediction, points.x_t, points.t, trainer.run.model.prediction_type)
    assert torch.allclose(nodes.x0_hat, x0_hat, atol=1e-5)
    assert torch.allclose(nodes.time, points.t.timestep.flatten() / 1000)
    assert torch.equal(nodes.baseline, others_mean(rollout.rewards, rollout.group)[points.image])
    said = lightness(trainer.run.model.decode(x0_hat), points.prompts)
    assert torch.allclose(nodes.x0_reward, said, atol=1e-5)


def test_the_value_is_made_as_its_settings_say(tmp_path):
    value = replace(VALUE, reward_until=0.6, learning_rate=0.05)
    trainer = made(tmp_path, advantage="return_minus_value", value=value, learning=replace(LEARNING, window=None))
    nodes = judged_by(trainer)[1].nodes
    is_asked = nodes.time <= 0.6
    assert is_asked.any() and not is_asked.all()
    assert torch.equal(nodes.x0_reward != 0, is_asked)
    assert trainer.critic.state_dict()["optimizer"]["param_groups"][0]["lr"] == 0.05


def test_the_value_is_learnt_from_the_moments_after_they_were_judged(tmp_path):
    trainer = made(tmp_path, advantage="return_minus_value")
    points = trainer.prepare(0)
    assert torch.isfinite(points.facts["value/explained_variance"])
    before = trainer.critic.evaluate(judged_by(trainer)[1].nodes, batch_size=8)
    trainer.prepare(0)
    assert not torch.equal(before, trainer.critic.evaluate(judged_by(trainer)[1].nodes, batch_size=8))


def test_the_cost_of_a_path_is_taken_off_the_reward(tmp_path):
    free, charged = (judged_by(made(tmp_path, kl_weight=weight))[1] for weight in (0.0, 0.5))
    assert (charged.returns < free.returns).all()
    assert torch.equal(charged.points.cost_weight, torch.full((8,), 0.5))


def test_what_a_path_costs_is_summed_over_its_steps_of_which_some_are_asked(tmp_path):
    """Σ_k KL(q ‖ reference) - KL(q ‖ policy) of four steps, from two: each counts twice."""
    trainer = made(tmp_path, kl_weight=0.5)
    rollout, judged = judged_by(trainer)
    run, model = trainer.run, trainer.run.model
    points = _noised(rollout, run, trainer.config, "log-ratio")
    posterior = transition_of(model, points.prediction, points, Ddim(1.0))

    def distance():
        with torch.no_grad():
            found = model.predict(points.x_t, points.t.timestep.flatten(), points.conditioning)
        return posterior.kl(transition_of(model, found, points, Ddim(1.0))).view(2, 4).sum(dim=0)

    policy = distance()
    with run.policy.reference():
        ratio = 2 * (distance() - policy)
    returns = rollout.rewards - 0.5 * ratio
    assert (returns - rollout.rewards).abs().min() > 1e-3
    assert torch.allclose(judged.returns, returns[judged.points.image], rtol=1e-3, atol=1e-3 * ratio.abs().max())
    expected = (returns - others_mean(returns, rollout.group))[judged.points.image]
    assert torch.allclose(judged.points.advantage, expected, rtol=1e-3, atol=1e-3 * ratio.abs().max())


def test_the_bound_is_clipped_by_what_the_reference_has(tmp_path):
    trainer = made(tmp_path, bound_clip=0.2)
    points = judged_by(trainer)[1].points
    model = trainer.run.model
    posterior = transition_of(model, points.prediction, points, Ddim(1.0))
    with trainer.run.policy.reference():
        prediction = model.predict(points.x_t, points.t.timestep.flatten(), points.conditioning)
    expected = posterior.kl(transition_of(model, prediction, points, Ddim(1.0)))
    assert torch.allclose(points.reference_kl, expected, rtol=1e-3)
    assert judged_by(made(tmp_path, bound_clip=None))[1].points.reference_kl is None


def test_an_image_alone_has_nothing_to_be_compared_with(tmp_path):
    alone = RolloutConfig(prompts=4, images_per_prompt=1, num_steps=5, solver="dpm_solver", eta=0.0, guidance_scale=1.0)
    with pytest.raises(ValueError, match="one image per prompt"):
        judged_by(made(tmp_path, rollout=alone))
    judged = judged_by(made(tmp_path, rollout=alone, advantage="return_minus_value"))[1]
    assert torch.isfinite(judged.points.advantage).all()


@pytest.mark.parametrize(
    "rollout",
    [
        ROLLOUT,
        replace(ROLLOUT, solver="euler_maruyama", eta=1.0),
        replace(ROLLOUT, solver="ddim", eta=0.0),
        replace(ROLLOUT, solver="ddim", eta=1.0, spacing="uniform"),
    ],
    ids=lambda rollout: f"{rollout.solver} {rollout.eta:g}",
)
@pytest.mark.parametrize("window", [None, (0.0, 1.0), (0.0, 0.5)])
def test_a_schedule_that_ends_at_clean_data_trains_with_every_solver(tmp_path, rollout, window):
    pipe = tiny_sd()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True)
    learning = LearningConfig(micro_batch=4, window=window)
    settings = {"estimator": "endpoint", "advantage": "group", "rollout": rollout, "learning": learning}
    trainer = score_as_action(tmp_path, pipe=pipe, kl_weight=0.1, reward=lightness, **settings)
    trainer.train()  # with its preflight
    last = read_metrics(trainer.folder)[-1]
    assert all(math.isfinite(last[name]) for name in ("loop/loss", "loop/grad_norm", "policy/kl", "policy/bound"))
    assert last["loop/grad_norm"] > 0


@pytest.mark.parametrize(("freeze", "branches"), [(True, 1), (False, 2)])
def test_the_negative_branch_of_a_noised_moment_is_differentiated_only_if_asked_for(tmp_path, freeze, branches):
    learning = replace(LEARNING, freeze_negative=freeze, guidance_scale=2.0)
    trainer = made(tmp_path, learning=learning)
    points = trainer.prepare(0)
    rows = []
    trainer.run.model.denoiser.register_forward_hook(lambda network, args, output: rows.append(len(args[0])))
    found = current_prediction(trainer.run.model, points, 2.0)
    assert sum(rows) == branches * len(points)
    with torch.no_grad():
        whole = predict_at(trainer.run.model, points.x_t, points.t, points.conditioning, guidance_scale=2.0)
    assert torch.allclose(found, whole, atol=1e-5)
