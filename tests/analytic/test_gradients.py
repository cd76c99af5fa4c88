"""Every estimator of the policy gradient, through a trainer's own rollouts and loss, against the exact gradient."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from rpo.trainers.rollouts.settings import StepsConfig
from rpo.trainers.value.inputs import skip_weights
from tests.analytic.chains import affine, predictions
from tests.analytic.closed_forms import OTHER, PRINTED
from tests.analytic.linear_quadratic import (
    Case,
    double,
    error,
    exact_gradient,
    gradient,
    move,
    plug,
    score_as_action,
    value_config,
)

pytestmark = pytest.mark.analytic

CASES = {
    "vp, ddim": Case(PRINTED, (0.3, -0.2)),
    "vp, euler-maruyama, eta 0.7": Case(PRINTED, (-0.25, 0.35), solver="euler_maruyama", eta=0.7),
    "other vp, ddim, eta 0.8": Case(OTHER, (-0.25, 0.35), eta=0.8),
    "other vp, euler-maruyama": Case(OTHER, (0.3, -0.2), solver="euler_maruyama"),
    "flow, euler-maruyama, lambda 0.5": Case(PRINTED, (0.3, -0.2), "flow", "euler_maruyama", math.sqrt(0.5)),
    "other flow, ddim": Case(OTHER, (-0.25, 0.35), "flow"),
}
ESTIMATORS = ["pathwise", "likelihood", "likelihood_state_cost"]
NUM_STEPS, ROWS = 8, 16_000
KEPT = 3
"""Steps trained of each trajectory where they are chosen."""


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimator_is_the_exact_gradient(tmp_path, case, estimator):
    trainer = score_as_action(case, tmp_path, estimator=estimator, rollout=case.rollout(ROWS, NUM_STEPS))
    exact = exact_gradient(trainer, case, move(trainer, case))
    assert error(-gradient(trainer, trainer.algorithm.loss), exact) < 0.03


@pytest.mark.parametrize("name", ["vp, ddim", "other vp, euler-maruyama"])
def test_cost_by_state_without_its_explicit_term_is_another_gradient(tmp_path, name):
    """Which one is known too: that of an objective whose costs do not follow the policy."""
    case = CASES[name]
    rollout = case.rollout(ROWS, NUM_STEPS)
    trainer = score_as_action(case, tmp_path, estimator="likelihood_state_cost", rollout=rollout)
    steps = move(trainer, case)
    incomplete = exact_gradient(trainer, case, steps.detached("a", "b"))
    loss = trainer.algorithm.loss

    def without_reference(steps):
        return replace(steps, known={name: value for name, value in steps.known.items() if name != "reference"})

    found = -gradient(trainer, lambda points: loss(without_reference(points)))
    assert error(found, incomplete) < 0.03
    assert error(found, exact_gradient(trainer, case, steps)) > 0.1


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_few_steps_of_each_trajectory_give_the_gradient_of_all(tmp_path, estimator):
    case = CASES["other vp, euler-maruyama"]
    trainer = score_as_action(
        case,
        tmp_path,
        estimator=estimator,
        rollout=case.rollout(2 * ROWS, NUM_STEPS),
        steps=StepsConfig(train_steps=KEPT),
    )
    exact = exact_gradient(trainer, case, move(trainer, case))
    assert error(-gradient(trainer, trainer.algorithm.loss), exact) < 0.03


@pytest.mark.parametrize("train_steps", [None, KEPT])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_graph_of_the_rollout_gives_the_same_gradient(tmp_path, estimator, train_steps):
    case = CASES["vp, ddim"]
    trainer = score_as_action(
        case,
        tmp_path,
        estimator=estimator,
        rollout=case.rollout(64, NUM_STEPS, batch_size=32),
        steps=StepsConfig(train_steps=train_steps, keep_graph=True),
    )
    move(trainer, case)
    loss = trainer.algorithm.loss
    kept = gradient(trainer, loss)
    assert error(gradient(trainer, lambda points: loss(replace(points, live=None))), kept) < 1e-6


@pytest.mark.parametrize("advantage", ["return_minus_value", "gae", "group"])
@pytest.mark.parametrize("estimator", ["likelihood", "likelihood_state_cost"])
def test_advantages_give_the_same_gradient(tmp_path, estimator, advantage):
    case = CASES["other vp, ddim, eta 0.8"]
    trainer = score_as_action(
        case, tmp_path, estimator=estimator, advantage=advantage, rollout=case.rollout(2 * ROWS, NUM_STEPS)
    )
    exact = exact_gradient(trainer, case, move(trainer, case))
    assert error(-gradient(trainer, trainer.algorithm.loss), exact) < 0.03


@pytest.mark.parametrize("estimator", ["likelihood", "likelihood_state_cost"])
def test_one_scale_for_all_advantages_keeps_the_direction(tmp_path, monkeypatch, estimator):
    """The explicit cost is scaled with them."""
    monkeypatch.setattr("rpo.trainers.value.returns.MAX_ADVANTAGE", torch.inf)
    case = CASES["other vp, ddim, eta 0.8"]
    settings = {"normalize": "batch", "rollout": case.rollout(2 * ROWS, NUM_STEPS)}
    trainer = score_as_action(case, tmp_path, estimator=estimator, **settings)
    exact = exact_gradient(trainer, case, move(trainer, case))
    found = -gradient(trainer, trainer.algorithm.loss)
    assert error(found / found.norm(), exact / exact.norm()) < 0.03
    assert error(found, exact) > 0.1


@pytest.mark.parametrize(
    "case",
    [
        Case(PRINTED, (0.3, -0.2), eta=0.0),
        Case(OTHER, (-0.25, 0.35), solver="euler_maruyama", eta=0.0),
        Case(PRINTED, (0.3, -0.2), "flow", eta=0.0),
    ],
    ids=["vp, ddim", "other vp, euler", "flow, euler"],
)
def test_pathwise_differentiates_an_ode(tmp_path, case):
    rollout = case.rollout(4, NUM_STEPS)
    trainer = score_as_action(case, tmp_path, width=ROWS, estimator="pathwise", rollout=rollout)
    exact = exact_gradient(trainer, case, move(trainer, case))
    assert error(-gradient(trainer, trainer.algorithm.loss), exact) < 0.03


class SeesPrediction(nn.Module):
    """F such that V is exact, though all it sees is x0_hat; makes up for what the reward says, if that takes part."""

    def __init__(self, exact, x0_hat, uses_reward, reward):
        super().__init__()
        self.exact, self.x0_hat, self.uses_reward, self.reward = exact, x0_hat, uses_reward, reward

    def forward(self, points):
        slope, offset = self.x0_hat[self.exact.node(points.time)].float().unbind(dim=1)
        x_t = (points.x0_hat.flatten(1) - offset[:, None]) / slope[:, None]
        skip, out = skip_weights(points.time) if self.uses_reward else (0.0 * points.time, torch.ones_like(points.time))
        rest = skip * self.reward(points.x0_hat).flatten() + (1 - skip) * points.baseline
        return (self.exact.at(x_t, points.time) - rest) / out.clamp_min(1e-6)


@pytest.mark.parametrize("uses_reward", [False, True])
def test_pathwise_follows_all_of_the_slope_of_v(tmp_path, uses_reward):
    case = CASES["other vp, euler-maruyama"]
    value = value_config(uses_reward=uses_reward, reward_until=1.0)
    rollout = case.rollout(ROWS, NUM_STEPS)
    trainer = score_as_action(case, tmp_path, estimator="pathwise", value=value, rollout=rollout)
    exact = exact_gradient(trainer, case, move(trainer, case))
    x0_hat = predictions(trainer.run.model, double(trainer.algorithm.collector.rollouts.grid(0)))[0]
    terms = torch.cat([torch.stack(affine(x0_hat.detach()), dim=1), torch.tensor([[1.0, 0.0]])])
    plug(
        trainer.algorithm.value,
        SeesPrediction(trainer.algorithm.value.network, terms, uses_reward, case.problem.quadratic),
    )
    assert error(-gradient(trainer, trainer.algorithm.loss), exact) < 0.03
