"""The losses of the online algorithms against their formulas written out, where the policy has left its rollout."""

from dataclasses import replace

import pytest
import torch

from rpo.objectives.policy_gradient import clipped_surrogate
from rpo.trainers.endpoint import HOLD
from rpo.trainers.rollouts.settings import StepsConfig
from rpo.trainers.rollouts.steps import transition_by
from rpo.trainers.value.settings import ValueConfig
from tests.trainers.online_runs import (  # noqa: F401
    ROLLOUT,
    VALUE,
    close,
    endpoint,
    grpo,
    lightness,
    moved,
    replayed_by,
    score_as_action,
    small_value,
)

STEPS, COEFFICIENT = 3, 0.7
TWICE = StepsConfig(passes=2)


def prepared(make, folder, **changes):
    """A trainer whose policy has moved since its rollout, and the steps of that."""
    trainer = moved(make(folder, reward=lightness, rollout=replace(ROLLOUT, guidance_scale=1.0), **changes))
    steps = trainer.algorithm.collect(0)
    return moved(trainer), steps


def transitions(trainer, steps):
    """The policy's as it is now, with its gradient; that of the rollout; and the reference's."""
    model, kernel = trainer.run.model, trainer.algorithm.collector.kernel
    _, now = replayed_by(trainer, steps)
    with trainer.run.policy.reference():
        base = model.predict(steps.x_t, steps.t.timestep.flatten(), steps.conditioning, 1.0)
    return [now, *(transition_by(model, prediction, steps, kernel) for prediction in (steps["prediction"], base))]


def distance(first, second):
    return 0.5 * ((first.mean - second.mean) ** 2 / second.std**2).sum(dim=(1, 2, 3))


def gradient(value, trainer):
    found = torch.autograd.grad(value, trainer.run.policy.parameters)
    return torch.cat([one.flatten() for one in found])


def assert_same(found, expected, trainer):
    assert found.item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-3)
    assert close(gradient(found, trainer), gradient(expected, trainer))


def clipped(now, steps):
    return clipped_surrogate(now.log_prob(steps.x_s), steps["log_prob"], steps["advantage"], num_dims=256, clip=1e-2)


@pytest.mark.parametrize("kl_weight", [0.05, 50.0])
def test_grpo_is_its_surrogate_and_the_weighted_kl_of_every_step(tmp_path, kl_weight):
    trainer, steps = prepared(grpo, tmp_path, kl_weight=kl_weight, clip=1e-2)
    now, _, base = transitions(trainer, steps)
    expected = STEPS * (clipped(now, steps).loss + kl_weight * distance(now, base)).mean()
    assert_same(trainer.algorithm.loss(steps).loss, expected, trainer)


def test_a_likelihood_with_its_exact_cost_scales_both_alike(tmp_path):
    changes = {"estimator": "likelihood_state_cost", "kl_weight": 2.0, "normalize": "batch"}
    trainer, steps = prepared(score_as_action, tmp_path, **changes)
    now, _, base = transitions(trainer, steps)
    assert (steps["cost_weight"] / 2.0 - 1).abs().min() > 0.1
    gain = steps["advantage"] * (now.log_prob(steps.x_s) - steps["log_prob"])
    expected = STEPS * (steps["cost_weight"] * distance(now, base) - gain).mean()
    assert_same(trainer.algorithm.loss(steps).loss, expected, trainer)


def test_a_sampled_log_ratio_has_no_slope_of_its_own(tmp_path):
    trainer, steps = prepared(score_as_action, tmp_path, estimator="likelihood", kl_weight=2.0)
    now, _, base = transitions(trainer, steps)
    output = trainer.algorithm.loss(steps)
    gain = steps["advantage"] * (now.log_prob(steps.x_s) - steps["log_prob"])
    assert_same(output.loss, -STEPS * gain.mean(), trainer)
    assert output.metrics["policy/kl"].item() == pytest.approx(STEPS * distance(now, base).mean().item(), rel=1e-3)


def test_a_trust_region_is_of_the_root_of_the_distance_of_whole_paths(tmp_path):
    trainer, steps = prepared(score_as_action, tmp_path, update="trust_region", steps=TWICE)
    trainer.algorithm.region.coefficient = COEFFICIENT
    now, old, _ = transitions(trainer, steps)
    path = STEPS * distance(now, old)
    gain = steps["advantage"] * (now.log_prob(steps.x_s) - steps["log_prob"])
    output = trainer.algorithm.loss(steps)
    assert_same(output.loss, (COEFFICIENT * path.sqrt() - STEPS * gain).mean(), trainer)
    assert output.metrics["policy/kl_from_rollout"].item() == pytest.approx(path.mean().item(), rel=1e-3)


def test_the_coefficient_of_a_trust_region_follows_the_last_update_of_each_rollout(tmp_path):
    algorithm = score_as_action(tmp_path, update="trust_region", steps=TWICE).algorithm
    seen = []
    algorithm.region.observe = seen.append
    for update, kl in enumerate((0.0, 4.0, 1.0, 9.0), start=1):
        algorithm.after(update, {"policy/kl_from_rollout": kl})
    assert seen == [4.0, 9.0]


def test_a_clip_is_that_of_the_ratio_per_dimension(tmp_path):
    trainer, steps = prepared(score_as_action, tmp_path, update="clip", clip=1e-2)
    surrogate = clipped(transitions(trainer, steps)[0], steps)
    output = trainer.algorithm.loss(steps)
    assert 0 < surrogate.is_clipped.float().mean() < 1
    assert output.metrics["policy/clipped"] == surrogate.is_clipped.float().mean()
    assert_same(output.loss, STEPS * surrogate.loss.mean(), trainer)


def test_pathwise_follows_the_slope_of_the_value_and_pays_for_the_step(tmp_path):
    value = ValueConfig(sees_latents=True, updates=2, batch_size=8, pretrain_rollouts=0)
    trainer, steps = prepared(score_as_action, tmp_path, estimator="pathwise", kl_weight=0.1, value=value)
    slope = 10 * torch.randn(steps.x_t.shape, generator=torch.Generator().manual_seed(0))  # to weigh as much as costs
    steps = steps.knowing(slope=slope)
    now, old, base = transitions(trainer, steps)
    gain = ((now.mean - old.mean) * slope).sum(dim=(1, 2, 3))
    expected = STEPS * (steps["cost_weight"] * distance(now, base) - gain).mean()
    assert steps["cost_weight"].tolist() == pytest.approx([0.1] * len(steps))
    assert 0.2 < gain.abs().mean() / (0.1 * distance(now, base)).mean() < 5
    assert_same(trainer.algorithm.loss(steps).loss, expected, trainer)


def test_the_endpoint_weighs_the_bound_by_worth_consistency_and_hold(tmp_path):
    trainer, steps = prepared(endpoint, tmp_path, kl_weight=2.0, consistency=0.4, clip=None)
    now, posterior, _ = transitions(trainer, steps)
    weight = steps["advantage"] + 0.4 + HOLD * steps["cost_weight"]
    expected = STEPS * (weight * distance(posterior, now)).mean()
    assert_same(trainer.algorithm.loss(steps).loss, expected, trainer)


def test_an_endpoint_logs_its_bound_for_whole_paths(tmp_path):
    trainer, steps = prepared(endpoint, tmp_path, clip=0.3)
    now, posterior, _ = transitions(trainer, steps)
    bound = STEPS * distance(posterior, now).mean().item()
    assert trainer.algorithm.loss(steps).metrics["policy/bound"].item() == pytest.approx(bound, rel=1e-3)


def test_a_value_is_fitted_as_its_own_settings_say(tmp_path):
    value = ValueConfig(updates=3, batch_size=5, pretrain_rollouts=0, trace=0.3)
    algorithm, told = score_as_action(tmp_path, value=value, trace=0.8).algorithm, {}
    algorithm.value.fit_paths = lambda *_, **settings: told.update(settings) or {}
    algorithm.collect(0)
    assert told == {"trace": 0.3, "steps": 3, "batch_size": 5}


@pytest.mark.parametrize(("make", "changes"), [(score_as_action, {}), (endpoint, {"baseline": "value"})])
def test_before_the_first_rollout_the_value_is_learnt_from_others(tmp_path, make, changes):
    algorithm, drawn = make(tmp_path, value=replace(VALUE, pretrain_rollouts=2), **changes).algorithm, []
    draw = algorithm.collector.draw
    algorithm.collector.draw = lambda index: drawn.append(index) or draw(index)
    algorithm.collect(0)
    algorithm.collect(1)
    assert len(drawn) == len(set(drawn)) == 4
    assert drawn[2:] == [0, 1]
