"""What is asked of the denoiser about a rollout: the same whether it was kept or is computed again."""

from dataclasses import replace

import pytest
import torch

from rpo.models.base import guided
from rpo.process.continuous import running_cost
from rpo.process.prediction import to_x0_eps
from rpo.process.transition import Ddim
from rpo.sampling.sample import Keep
from rpo.trainers.rollouts.costs import step_cost
from rpo.trainers.rollouts.settings import StepsConfig
from rpo.trainers.rollouts.steps import all_steps_of, transition_by
from tests.trainers.online_runs import ROLLOUT, close, grpo, moved, replayed_by

KERNEL = Ddim(1.0)


def all_steps(trainer):
    collector = trainer.algorithm.collector
    return collector.steps(collector.draw(0))


def slope(trainer, value):
    found = torch.autograd.grad(value.square().sum(), trainer.run.policy.parameters)
    return torch.cat([one.flatten() for one in found])


@pytest.mark.parametrize("freeze_negative", [True, False])
def test_the_graph_of_the_rollout_is_that_of_computing_it_again(tmp_path, freeze_negative):
    steps = StepsConfig(keep_graph=True, freeze_negative=freeze_negative)
    trainer = moved(grpo(tmp_path, steps=steps, rollout=replace(ROLLOUT, batch_size=2)))
    stream = trainer.algorithm.batches(0)
    parts = [next(stream) for _ in range(trainer.algorithm.division[1])]
    assert sum(map(len, parts)) == ROLLOUT.images * 3
    for part in parts:
        assert part.live is not None
        again, _ = replayed_by(trainer, replace(part, live=None))
        assert close(part.live, again)
        assert torch.equal(part.live, part["prediction"])
        assert close(slope(trainer, part.live), slope(trainer, again))


def test_the_negative_branch_of_the_rollout_replaces_computing_it(tmp_path):
    trainer = moved(grpo(tmp_path))
    model, steps = trainer.run.model, all_steps(trainer)
    x_t, timestep, cond = steps.x_t, steps.t.timestep.flatten(), steps.conditioning
    prompt_pred = model.predict(x_t, timestep, cond, 1.0)
    with torch.no_grad():
        negative_pred = model.predict(x_t, timestep, cond.only_negative(), 1.0)
    assert close(steps["negative"], negative_pred)
    found, _ = replayed_by(trainer, steps)
    expected = guided(negative_pred, prompt_pred, 2.0)
    assert close(found, expected)
    assert close(slope(trainer, found), slope(trainer, expected))
    known = {name: value for name, value in steps.known.items() if name != "negative"}
    whole, _ = replayed_by(trainer, replace(steps, known=known))
    assert close(whole, expected)
    assert not close(slope(trainer, whole), slope(trainer, replayed_by(trainer, steps)[0]))


def test_the_reference_is_the_policy_at_the_start_in_any_batches(tmp_path):
    trainer = grpo(tmp_path)
    steps = all_steps(trainer)
    fresh = trainer.algorithm.collector.reference(steps)
    assert close(fresh, steps["prediction"])
    moved(trainer)
    assert close(trainer.algorithm.collector.reference(steps), fresh)
    assert not close(replayed_by(trainer, steps)[0], fresh)
    assert not fresh.requires_grad


def test_a_step_costs_its_kl_and_that_of_an_ode_its_running_cost(tmp_path):
    trainer = moved(grpo(tmp_path))
    model, steps = trainer.run.model, all_steps(trainer)
    reference = trainer.algorithm.collector.reference(steps)
    policy, old = (transition_by(model, pred, steps, KERNEL) for pred in (steps["prediction"], reference))
    expected = 0.5 * ((policy.mean - old.mean) ** 2 / policy.std**2).sum(dim=(1, 2, 3))
    assert torch.allclose(step_cost(model, steps["prediction"], reference, steps, KERNEL), expected, rtol=1e-5)
    eps = [to_x0_eps(pred, steps.x_t, steps.t, "epsilon")[1] for pred in (steps["prediction"], reference)]
    found = step_cost(model, steps["prediction"], reference, steps, Ddim(0.0))
    assert torch.allclose(found, running_cost(*eps, steps.t, steps.s, eta=0.0))
    assert (step_cost(model, reference, reference, steps, KERNEL) == 0).all()


def kl_of_paths(trainer, rollout):
    """Step by step, summed over each path; mean over the images."""
    steps = all_steps_of(rollout)
    reference = trainer.algorithm.collector.reference(steps)
    return step_cost(trainer.run.model, steps["prediction"], reference, steps, KERNEL).view(3, -1).sum(dim=0).mean()


def drawn(trainer, index):
    return trainer.algorithm.collector.rollouts.draw(index, lambda _: Keep(predictions=True))


def test_the_kl_that_is_measured_is_that_of_whole_paths(tmp_path, monkeypatch):
    trainer = moved(grpo(tmp_path))
    few, rollout = (drawn(trainer, index) for index in (1, 2))
    assert 0 < trainer.algorithm.collector.measured_kl(few) < 3 * kl_of_paths(trainer, few)
    monkeypatch.setattr("rpo.trainers.rollouts.costs.KL_STRIDE", 1)
    found = trainer.algorithm.collector.measured_kl(rollout)
    assert torch.allclose(found, kl_of_paths(trainer, rollout), rtol=1e-4)


def test_every_so_often_each_step_is_measured_once(tmp_path):
    """Over as many rollouts as the stride says, also where there are fewer steps than that."""
    trainer = moved(grpo(tmp_path, rollout=replace(ROLLOUT, prompts=1)))
    rollout = drawn(trainer, 0)
    turns = [trainer.algorithm.collector.measured_kl(replace(rollout, index=index)) for index in range(6)]
    assert torch.allclose(torch.stack(turns).mean(), kl_of_paths(trainer, rollout), rtol=1e-4)


def test_the_kl_of_a_loss_is_that_of_whole_paths(tmp_path):
    trainer = moved(grpo(tmp_path, kl_weight=0.1))
    facts = trainer.algorithm.loss(trainer.algorithm.collect(0)).metrics
    rollout = trainer.algorithm.collector.rollout
    assert torch.allclose(facts["policy/kl"], kl_of_paths(trainer, rollout), rtol=1e-4)
