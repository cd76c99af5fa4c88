"""GRPO's gradient: that of the reward, less what a mean over the own group takes away, and that of the KL."""

import pytest
import torch

from rpo.trainers.grpo import GRPO
from rpo.trainers.grpo_config import GRPOConfig
from rpo.trainers.rollouts.settings import OnlineLearningConfig
from rpo.trainers.trainer import Trainer
from tests.analytic.closed_forms import OTHER, PRINTED
from tests.analytic.linear_quadratic import (
    ALL,
    FULL,
    Case,
    error,
    gradient,
    move,
    objective,
    score_as_action,
)
from tests.analytic.toys import ImageReward

pytestmark = pytest.mark.analytic

NUM_STEPS, GROUP, PROMPTS, ROLLOUTS = 8, 8, 600, 4
CASES = {
    "vp, ddim": Case(PRINTED, (-0.25, 0.35)),
    "other vp, euler-maruyama": Case(OTHER, (-0.25, 0.35), solver="euler_maruyama"),
}


def grpo(case, folder, *, prompts=PROMPTS, **settings):
    config = GRPOConfig(
        scale="none",
        rollout=case.rollout(GROUP, NUM_STEPS, prompts=prompts),
        learning=OnlineLearningConfig(micro_batch=ALL),
        adapter=FULL,
        preview_every=0,
        preflight=False,
        output=str(folder),
        **settings,
    )
    trainer = Trainer(case.model(), GRPO(ImageReward(case.problem.quadratic), ["x"], config))
    return trainer, trainer.algorithm.loss


@pytest.fixture(autouse=True)
def uncut(monkeypatch):
    """Advantages as they are."""
    monkeypatch.setattr("rpo.trainers.grpo.MAX_ADVANTAGE", torch.inf)


def slope(value, trainer):
    return torch.autograd.grad(value, trainer.run.policy.parameters[0], retain_graph=True)[0]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
def test_gradient_is_that_of_the_reward_and_of_every_step_s_kl(tmp_path, case, kl_weight):
    """The mean of a group has the own reward in it, which takes 1/G away; how the KL depends on where the policy leads
    is left out."""
    trainer, descend = grpo(case, tmp_path, kl_weight=kl_weight)
    steps = move(trainer, case)
    reward = objective(steps, case.problem.quadratic, 0.0)[0]
    here = objective(steps.detached("slope", "offset"), case.problem.quadratic, 1.0)[0]  # -KL with the states fixed
    expected = (1 - 1 / GROUP) * slope(reward, trainer) + kl_weight * slope(here, trainer)
    found = sum(-gradient(trainer, descend, index) for index in range(ROLLOUTS)) / ROLLOUTS
    assert error(found, expected) < 0.03


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_regression_of_paths_starts_with_the_gradient_of_the_reward(tmp_path, case):
    """2η of it, of which a group's mean takes nothing away."""
    trainer, descend = grpo(case, tmp_path, regression=0.7)
    reward = objective(move(trainer, case), case.problem.quadratic, 0.0)[0]
    found = sum(-gradient(trainer, descend, index) for index in range(ROLLOUTS)) / ROLLOUTS
    assert error(found, 2 * 0.7 * slope(reward, trainer)) < 0.03


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kl_has_a_gradient_away_from_the_reference_and_none_at_it(tmp_path, case):
    weighted, plain = (grpo(case, tmp_path, prompts=8, kl_weight=weight) for weight in (0.5, 0.0))
    assert torch.allclose(gradient(*weighted), gradient(*plain), rtol=1e-4)
    for trainer, _ in (weighted, plain):
        move(trainer, case)
    assert error(gradient(*weighted), gradient(*plain)) > 0.1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_same_points_as_score_as_action_with_the_group_as_its_value(tmp_path, case):
    """The others' mean instead of the group's: G / (G - 1) times the same, rollout by rollout."""
    trainer, descend = grpo(case, tmp_path, prompts=8)
    rollout = case.rollout(GROUP, NUM_STEPS, prompts=8)
    other = score_as_action(case, tmp_path, estimator="likelihood", advantage="group", kl_weight=0.0, rollout=rollout)
    for one in (trainer, other):
        move(one, case)
    assert torch.allclose(
        gradient(trainer, descend) * GROUP / (GROUP - 1), gradient(other, other.algorithm.loss), rtol=1e-4
    )
