"""Moments noised afresh: what each is worth against the group and against a value, and where a bound is clipped."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from rpo.process.prediction import to_x0_eps
from rpo.process.transition import Ddim
from rpo.trainers.rollouts.settings import RolloutConfig, StepsConfig
from rpo.trainers.rollouts.steps import transition_by
from rpo.trainers.value.inputs import others_mean
from rpo.trainers.value.settings import ValueConfig
from rpo.training.log import read_metrics
from tests.tiny import tiny_sd
from tests.trainers.online_runs import endpoint, lightness, moved, replayed_by, small_value  # noqa: F401

ROLLOUT = RolloutConfig(prompts=2, images_per_prompt=2, num_steps=5, solver="dpm_solver", eta=0.0, guidance_scale=1.0)
STEPS = StepsConfig(train_steps=2, window=(0.0, 0.8))
VALUE = ValueConfig(updates=30, batch_size=8, pretrain_rollouts=0, reward_until=1.0)
OF_VALUE = {"baseline": "value"}


def made(folder, **changes):
    defaults = {"scale": "none", "rollout": ROLLOUT, "steps": STEPS, "value": VALUE, "reward": lightness}
    return moved(endpoint(folder, **defaults | changes))


def collected(trainer):
    """The steps of rollout 0, and the rollout."""
    steps = trainer.algorithm.collect(0)
    return steps, trainer.algorithm.collector.rollout


def seen_by_value(trainer):
    """What the value is asked about rollout 0, and fitted to: its points and targets."""
    seen, value = [], trainer.algorithm.value
    fit = value.fit
    value.fit = lambda points, targets, **settings: seen.append((points, targets)) or fit(points, targets, **settings)
    before = [parameter.clone() for parameter in value.network.parameters()]
    steps, rollout = collected(trainer)
    ((points, targets),) = seen
    return steps, rollout, points, targets.flatten(), before


def test_without_a_value_an_image_is_worth_more_than_the_others_of_its_prompt(tmp_path):
    steps, rollout = collected(made(tmp_path))
    assert len(steps) == 2 * 4
    expected = rollout.rewards - others_mean(rollout.rewards, rollout.group)
    assert torch.allclose(steps["advantage"], expected[steps.image])


def test_with_a_value_each_moment_is_worth_what_the_value_did_not_expect_and_it_learns_it_afterwards(tmp_path):
    trainer = made(tmp_path, **OF_VALUE)
    expected = []
    evaluate = trainer.algorithm.value.evaluate
    trainer.algorithm.value.evaluate = lambda *a, **k: expected.append(evaluate(*a, **k)) or expected[-1]
    steps, rollout, points, targets, before = seen_by_value(trainer)
    assert torch.equal(targets, rollout.rewards[steps.image])
    assert torch.allclose(steps["advantage"], targets - expected[0])
    assert torch.isfinite(steps.facts["value/explained_variance"])
    assert any(
        not torch.equal(*both) for both in zip(trainer.algorithm.value.network.parameters(), before, strict=True)
    )
    x0_hat, _ = to_x0_eps(replayed_by(trainer, steps)[0], steps.x_t, steps.t, trainer.run.model.prediction_type)
    assert torch.allclose(points.x0_hat, x0_hat, atol=1e-5)
    assert torch.allclose(points.time, steps.t.timestep.flatten() / 1000)
    assert torch.equal(points.baseline, others_mean(rollout.rewards, rollout.group)[steps.image])
    said = lightness(trainer.run.model.decode(x0_hat), points.prompts)
    assert torch.allclose(points.x0_reward, said, atol=1e-5)


def test_rollouts_of_any_length_give_moments_of_their_own_grid(tmp_path):
    rollout = RolloutConfig(prompts=2, images_per_prompt=2, num_steps=3, max_steps=7, spacing="uniform")
    trainer = made(tmp_path, rollout=rollout, steps=StepsConfig(train_steps=2))
    lengths = set()
    for index in range(8):
        steps = trainer.algorithm.collect(index)
        lengths.add(trainer.algorithm.collector.rollout.trajectory.grid.num_steps)
        assert torch.isfinite(trainer.algorithm.loss(steps).loss)
    assert max(lengths) > 4


def test_moments_end_before_the_clean_image_wherever_the_rollouts_do(tmp_path):
    pipe = tiny_sd(set_alpha_to_one=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, final_sigmas_type="sigma_min")
    trainer = made(tmp_path, pipe=pipe, steps=StepsConfig())
    steps, rollout = collected(trainer)
    assert float(rollout.trajectory.grid.sigma[-1]) > 0 and trainer.run.model.process.end == 0
    assert (steps.s.sigma > 0).all()
    assert torch.isfinite(trainer.algorithm.loss(steps).loss)


def test_equal_rewards_teach_nothing_however_the_distance_is_weighed(tmp_path):
    trainer = endpoint(tmp_path, reward=lambda images, prompts: images.new_ones(len(images)), kl_weight=0.1)
    steps = trainer.algorithm.collect(0)
    assert set(steps["advantage"].tolist()) == {0.0}
    assert torch.equal(steps["cost_weight"], torch.full_like(steps["cost_weight"], 0.1))


def test_what_is_logged_as_kl_is_that_of_the_path(tmp_path):
    trainer = made(tmp_path)
    steps, rollout = collected(trainer)
    assert trainer.algorithm.loss(steps).metrics["policy/kl"] == trainer.algorithm.collector.measured_kl(rollout) > 0


def test_no_negative_branch_of_the_rollout_is_kept_that_nobody_replays(tmp_path):
    _, rollout = collected(made(tmp_path, rollout=replace(ROLLOUT, guidance_scale=2.0)))
    assert rollout.trajectory.negatives is None


def test_before_training_nobody_asks_the_reference_how_far_it_is_from_itself(tmp_path):
    asked = []
    value = replace(VALUE, pretrain_rollouts=2)
    trainer = endpoint(tmp_path, rollout=ROLLOUT, value=value, kl_weight=0.1, **OF_VALUE)
    reference = trainer.algorithm.collector.reference
    trainer.algorithm.collector.reference = lambda steps: asked.append(1) or reference(steps)
    trainer.algorithm.collect(0)
    assert len(asked) == 2  # the clip's and the log-ratio's, of the rollout that is trained on


def test_the_value_is_made_as_its_settings_say(tmp_path):
    value = replace(VALUE, reward_until=0.6, learning_rate=0.05)
    trainer = made(tmp_path, value=value, steps=StepsConfig(), **OF_VALUE)
    points = seen_by_value(trainer)[2]
    is_asked = points.time <= 0.6
    assert is_asked.any() and not is_asked.all()
    assert torch.equal(points.x0_reward != 0, is_asked)
    assert trainer.algorithm.value.state_dict()["optimizer"]["param_groups"][0]["lr"] == 0.05


def bound(trainer, steps):
    posterior = transition_by(trainer.run.model, steps["prediction"], steps, Ddim(1.0))
    with torch.no_grad():
        return posterior.kl(replayed_by(trainer, steps, kernel=Ddim(1.0))[1])


def test_what_a_path_costs_is_summed_over_its_steps_of_which_some_are_asked(tmp_path, monkeypatch):
    """Σ_k KL(q ‖ reference) - KL(q ‖ policy) of four steps, from two: each counts twice."""
    trainer = made(tmp_path, kl_weight=0.5)
    made_steps = []

    def noised(*args, **settings):
        made_steps.append(noised_steps(*args, **settings))
        return made_steps[-1]

    from rpo.trainers.rollouts import noised as module

    noised_steps = module.noised_steps
    monkeypatch.setattr(module, "noised_steps", noised)
    steps, rollout = collected(trainer)
    (apart,) = (one for one in made_steps if not torch.equal(one.x_t, steps.x_t))  # other moments, with other noise
    policy = bound(trainer, apart)
    with trainer.run.policy.reference():
        ratio = 2 * (bound(trainer, apart) - policy).view(2, 4).sum(dim=0)
    returns = rollout.rewards - 0.5 * ratio
    assert (returns - rollout.rewards).abs().min() > 1e-3
    expected = (returns - others_mean(returns, rollout.group))[steps.image]
    assert torch.allclose(steps["advantage"], expected, rtol=1e-3, atol=1e-3 * ratio.abs().max())
    assert torch.equal(steps["cost_weight"], torch.full((8,), 0.5))


def test_the_bound_is_clipped_by_what_the_reference_has(tmp_path):
    trainer = made(tmp_path, clip=0.2)
    steps, _ = collected(trainer)
    with trainer.run.policy.reference():
        expected = bound(trainer, steps)
    assert torch.allclose(steps["reference_kl"], expected, rtol=1e-3)
    assert "reference_kl" not in collected(made(tmp_path, clip=None))[0]


def test_an_image_alone_is_compared_with_a_value_or_refused(tmp_path):
    alone = replace(ROLLOUT, prompts=4, images_per_prompt=1)
    with pytest.raises(ValueError, match="images_per_prompt is 1"):
        made(tmp_path, rollout=alone)
    assert torch.isfinite(collected(made(tmp_path, rollout=alone, **OF_VALUE))[0]["advantage"]).all()


@pytest.mark.parametrize(
    "rollout",
    [
        ROLLOUT,
        pytest.param(replace(ROLLOUT, solver="euler_maruyama", eta=1.0), marks=pytest.mark.slow),
        replace(ROLLOUT, solver="ddim", eta=0.0),
        replace(ROLLOUT, solver="ddim", eta=1.0, spacing="uniform"),
    ],
    ids=lambda rollout: f"{rollout.solver} {rollout.eta:g}",
)
@pytest.mark.parametrize("window", [None, *(pytest.param((0.0, end), marks=pytest.mark.slow) for end in (1.0, 0.5))])
def test_a_schedule_that_ends_at_clean_data_trains_with_every_solver(tmp_path, rollout, window):
    pipe = tiny_sd()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True)
    steps = StepsConfig(window=window)
    trainer = endpoint(tmp_path, pipe=pipe, kl_weight=0.1, reward=lightness, rollout=rollout, steps=steps)
    trainer.train()  # with its preflight
    last = read_metrics(trainer.folder)[-1]
    assert all(math.isfinite(last[name]) for name in ("loop/loss", "loop/grad_norm", "policy/kl", "policy/bound"))
    assert last["loop/grad_norm"] > 0


@pytest.mark.parametrize(("freeze", "branches"), [(True, 1), (False, 2)])
def test_the_negative_branch_of_a_noised_moment_is_differentiated_only_if_asked_for(tmp_path, freeze, branches):
    trainer = made(tmp_path, steps=replace(STEPS, freeze_negative=freeze, guidance_scale=2.0))
    steps, rows = trainer.algorithm.collect(0), []
    trainer.run.model.denoiser.register_forward_hook(lambda network, args, output: rows.append(len(output[0])))
    found, _ = replayed_by(trainer, steps)
    assert sum(rows) == branches * len(steps)
    with torch.no_grad():
        whole = trainer.run.model.predict(steps.x_t, steps.t.timestep.flatten(), steps.conditioning, 2.0)
    assert torch.allclose(found, whole, atol=1e-5)
