"""The losses of the online trainers against their formulas written out, where the policy has left its rollout."""

from dataclasses import replace

import pytest
import torch
from rpo.objectives.policy import clipped_surrogate
from rpo.trainers.online_config import LearningConfig
from rpo.trainers.rollouts.moments import current_prediction, transition_of

from rpo.trainers.grpo import loss as grpo_loss
from rpo.trainers.rollouts.draw import training_kernel
from rpo.trainers.score_as_action import HOLD, loss
from rpo.trainers.score_as_action_config import ValueConfig
from tests.trainers.online_runs import LEARNING, ROLLOUT, grpo, lightness, score_as_action
from tests.trainers.test_moments import close, moved

STEPS, COEFFICIENT = 3, 0.7
PATHWISE = ValueConfig(channels=8, updates=2, batch_size=8, pretrain_rollouts=0, branch="differentiable")
TWICE = LearningConfig(micro_batch=4, passes=2)


def prepared(make, folder, **changes):
    """A trainer whose policy has moved since its rollout, and the points of that."""
    trainer = moved(make(folder, reward=lightness, rollout=replace(ROLLOUT, guidance_scale=1.0), **changes))
    points = trainer.prepare(0)
    return moved(trainer), points


def transitions(trainer, points, kernel):
    """The policy's as it is now, with its gradient; that of the rollout; and the reference's."""
    model = trainer.run.model
    now = current_prediction(model, points, 1.0)
    with trainer.run.policy.reference():
        base = model.predict(points.x_t, points.t.timestep.flatten(), points.conditioning, 1.0)
    return [transition_of(model, prediction, points, kernel) for prediction in (now, points.prediction, base)]


def distance(first, second):
    return 0.5 * ((first.mean - second.mean) ** 2 / second.std**2).sum(dim=(1, 2, 3))


def gradient(value, trainer):
    found = torch.autograd.grad(value, trainer.run.policy.parameters)
    return torch.cat([one.flatten() for one in found])


def assert_same(found, expected, trainer):
    assert found.item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-3)
    assert close(gradient(found, trainer), gradient(expected, trainer))


@pytest.mark.parametrize("kl_weight", [0.05, 50.0])
def test_grpo_is_its_surrogate_and_the_weighted_kl_of_every_step(tmp_path, kl_weight):
    trainer, points = prepared(grpo, tmp_path, kl_weight=kl_weight, clip=1e-2)
    now, _, base = transitions(trainer, points, training_kernel(trainer.config.rollout))
    surrogate = clipped_surrogate(now.log_prob(points.x_s), points.log_prob, points.advantage, num_dims=256, clip=1e-2)
    expected = STEPS * (surrogate.loss + kl_weight * distance(now, base)).mean()
    found = grpo_loss(points, policy=trainer.run.policy, config=trainer.config, guidance_scale=1.0)
    assert_same(found.loss, expected, trainer)


def score_as_action_loss(trainer, points):
    trainer.region.coefficient = COEFFICIENT
    settings = {"policy": trainer.run.policy, "config": trainer.config, "region": trainer.region}
    return loss(points, guidance_scale=1.0, **settings)


def test_a_likelihood_with_its_exact_cost_scales_both_alike(tmp_path):
    trainer, points = prepared(
        score_as_action, tmp_path, estimator="likelihood_state_cost", kl_weight=2.0, normalize="batch"
    )
    now, _, base = transitions(trainer, points, trainer.config.rollout_kernel)
    assert (points.cost_weight / 2.0 - 1).abs().min() > 0.1
    gain = points.advantage * (now.log_prob(points.x_s) - points.log_prob)
    expected = STEPS * (points.cost_weight * distance(now, base) - gain).mean()
    assert_same(score_as_action_loss(trainer, points).loss, expected, trainer)


def test_a_sampled_log_ratio_has_no_slope_of_its_own(tmp_path):
    trainer, points = prepared(score_as_action, tmp_path, estimator="likelihood", kl_weight=2.0)
    now, _, base = transitions(trainer, points, trainer.config.rollout_kernel)
    output = score_as_action_loss(trainer, points)
    assert_same(output.loss, -STEPS * (points.advantage * (now.log_prob(points.x_s) - points.log_prob)).mean(), trainer)
    assert output.metrics["policy/kl"].item() == pytest.approx(STEPS * distance(now, base).mean().item(), rel=1e-3)


@pytest.mark.parametrize("power", ["sqrt", "linear"])
def test_a_trust_region_is_of_the_distance_of_whole_paths(tmp_path, power):
    changes = {"update": "trust_region", "trust_region_power": power, "learning": TWICE}
    trainer, points = prepared(score_as_action, tmp_path, estimator="likelihood", **changes)
    now, old, _ = transitions(trainer, points, trainer.config.rollout_kernel)
    path = STEPS * distance(now, old)
    gain = points.advantage * (now.log_prob(points.x_s) - points.log_prob)
    expected = (COEFFICIENT * (path.sqrt() if power == "sqrt" else path) - STEPS * gain).mean()
    output = score_as_action_loss(trainer, points)
    assert_same(output.loss, expected, trainer)
    assert output.metrics["policy/kl_from_rollout"].item() == pytest.approx(path.mean().item(), rel=1e-3)


def test_the_coefficient_of_a_trust_region_follows_the_last_update_of_each_rollout(tmp_path):
    trainer = score_as_action(tmp_path, update="trust_region", estimator="likelihood", learning=TWICE)
    seen = []
    trainer.region.observe = seen.append
    for update, kl in enumerate((0.0, 4.0, 1.0, 9.0), start=1):
        trainer._after(update, {"policy/kl_from_rollout": kl})
    assert seen == [4.0, 9.0]


def test_the_endpoint_weighs_the_bound_by_worth_consistency_and_hold(tmp_path):
    trainer, points = prepared(
        score_as_action,
        tmp_path,
        estimator="endpoint",
        advantage="group",
        normalize="batch",
        kl_weight=2.0,
        consistency=0.4,
        bound_clip=None,
        learning=LEARNING,
    )
    now, posterior, _ = transitions(trainer, points, trainer.config.rollout_kernel)
    weight = points.advantage + 0.4 + HOLD * points.cost_weight
    expected = trainer.run.stands_for * (weight * distance(posterior, now)).mean()
    assert_same(score_as_action_loss(trainer, points).loss, expected, trainer)


def test_what_a_bounded_endpoint_logs_is_how_much_better_the_policy_s_bound_is(tmp_path):
    changes = {"estimator": "endpoint", "advantage": "group", "bound_clip": 0.3, "learning": LEARNING}
    trainer, points = prepared(score_as_action, tmp_path, **changes)
    now, posterior, base = transitions(trainer, points, trainer.config.rollout_kernel)
    metrics, steps = score_as_action_loss(trainer, points).metrics, trainer.run.stands_for
    bound, of_reference = (steps * distance(posterior, other).mean().item() for other in (now, base))
    assert metrics["policy/bound"].item() == pytest.approx(bound, rel=1e-3)
    assert metrics["policy/kl"].item() == pytest.approx(of_reference - bound, rel=1e-2)


def test_a_clip_is_that_of_the_ratio_per_dimension(tmp_path):
    trainer, points = prepared(score_as_action, tmp_path, estimator="likelihood", update="clip", clip=1e-2)
    now = transitions(trainer, points, trainer.config.rollout_kernel)[0]
    surrogate = clipped_surrogate(now.log_prob(points.x_s), points.log_prob, points.advantage, num_dims=256, clip=1e-2)
    output = score_as_action_loss(trainer, points)
    assert 0 < surrogate.is_clipped.float().mean() < 1
    assert output.metrics["policy/clipped"] == surrogate.is_clipped.float().mean()
    assert_same(output.loss, STEPS * surrogate.loss.mean(), trainer)


def test_a_value_is_fitted_as_its_own_settings_say(tmp_path):
    value = ValueConfig(channels=8, updates=3, batch_size=5, pretrain_rollouts=0, loss="martingale", trace=0.3)
    trainer, told = score_as_action(tmp_path, value=value, trace=0.8), {}
    trainer.critic.fit_paths = lambda *_, **settings: told.update(settings) or {}
    trainer.prepare(0)
    assert told == {"loss": "martingale", "trace": 0.3, "steps": 3, "batch_size": 5}


def test_pathwise_follows_the_slope_of_the_value_and_pays_for_the_step(tmp_path):
    trainer, points = prepared(score_as_action, tmp_path, estimator="pathwise", kl_weight=0.1, value=PATHWISE)
    slope = 10 * torch.randn(points.x_t.shape, generator=torch.Generator().manual_seed(0))  # to weigh as much as costs
    points = replace(points, value_gradient=slope)
    now, old, base = transitions(trainer, points, trainer.config.rollout_kernel)
    gain = ((now.mean - old.mean) * slope).sum(dim=(1, 2, 3))
    expected = STEPS * (points.cost_weight * distance(now, base) - gain).mean()
    assert points.cost_weight.tolist() == pytest.approx([0.1] * len(points))
    assert 0.2 < gain.abs().mean() / (0.1 * distance(now, base)).mean() < 5
    assert_same(score_as_action_loss(trainer, points).loss, expected, trainer)


def test_before_the_first_rollout_the_value_is_learnt_from_others(tmp_path):
    value = ValueConfig(channels=8, updates=2, batch_size=8, pretrain_rollouts=2, pretrain_updates=1)
    trainer, drawn = score_as_action(tmp_path, value=value), []
    draw = trainer.run.draw
    trainer.run.draw = lambda index: drawn.append(index) or draw(index)
    trainer.prepare(0)
    trainer.prepare(1)
    assert len(drawn) == len(set(drawn)) == 4
    assert drawn[2:] == [0, 1]
