"""Training through `train()` reaches the exact optimum of the grid it trains on, and what it learns holds on others."""

import dataclasses
import functools
import math

import pytest
import torch
from torch import nn

from rpo.trainers.rollouts.settings import OnlineLearningConfig, StepsConfig
from tests.analytic.closed_forms import OTHER, PRINTED
from tests.analytic.linear_quadratic import (
    ALL,
    Case,
    moments,
    node_times,
    objective,
    reward_terms,
    score_as_action,
    steps_of,
    value_config,
)
from tests.analytic.test_value import Quadratic

pytestmark = pytest.mark.analytic

NUM_STEPS = 50


class Piecewise(nn.Module):
    """A linear change of score whose coefficients are linear between even times, and which fades with the data."""

    def __init__(self, mean, knots):
        super().__init__()
        self.mean, self.theta = mean, nn.Parameter(torch.zeros(knots, 2))

    def forward(self, x_t, alpha, sigma, time):
        knots = torch.linspace(0, 1, len(self.theta), dtype=time.dtype)
        hats = (1 - (time[..., None] - knots).abs() * (len(knots) - 1)).clamp_min(0)
        slope, offset = (hats @ self.theta.to(hats)).unbind(dim=-1)
        return alpha * (offset + slope * (x_t - alpha * self.mean))


def optimum(steps, reward, beta):
    """(J, mean, variance) of the best control of a chain, a shift of every step's mean that costs its square."""
    P, p, c = reward_terms(reward)
    shifts = []
    for slope, offset, std in zip(steps.slope.flip(0), steps.offset.flip(0), steps.std.flip(0), strict=True):
        s2, d = std**2, beta + P * std**2
        shifts.append((beta / d, s2 * p / d))  # the best mean, of what the reference's would be
        c = c + p**2 * s2 / (2 * d) - P * s2 / 2
        P, p = P * beta / d, p * beta / d
        c, p, P = c + p * offset - P * offset**2 / 2, slope * (p - P * offset), slope**2 * P
    mean, variance = torch.zeros(()).double(), torch.ones(()).double()
    for slope, offset, std, (a, b) in zip(steps.slope, steps.offset, steps.std, shifts[::-1], strict=True):
        mean, variance = a * (slope * mean + offset) + b, (a * slope) ** 2 * variance + std**2
    return c - P / 2, mean, variance


PRINTED_CASE, OTHER_CASE = Case(PRINTED, (0.0, 0.0)), Case(OTHER, (0.0, 0.0))
OTHER_EULER = Case(OTHER, (0.0, 0.0), solver="euler_maruyama")
BOTH = pytest.mark.parametrize("case", [PRINTED_CASE, OTHER_CASE], ids=["printed", "other"])


def fast(*, updates):
    return OnlineLearningConfig(
        updates=updates,
        learning_rate=0.05,
        lr_schedule="linear",
        max_grad_norm=math.inf,
        checkpoint_every=updates,
        progress=False,
        micro_batch=ALL,
    )


def settled(trainer):
    """The trainer with an AdamW that forgets what gradients once were, as the law of a policy settles."""
    trainer.loop = dataclasses.replace(trainer.loop, adam_beta2=0.99)
    return trainer


def train(case, folder, *, knots, updates=120, **settings):
    """The policy after `train()`, its value learnt beside it."""
    model = case.model(Piecewise(*case.problem.prior.means, knots))
    grid = model.grid(NUM_STEPS)
    *_, mean, variance = moments(steps_of(model, grid, case.kernel()))
    defaults = {
        "rollout": case.rollout(300, NUM_STEPS),
        "network": Quadratic(node_times(grid, model.num_train_timesteps), mean, variance),
        "value": value_config(updates=10, batch_size=ALL, learning_rate=0.02, pretrain_rollouts=1),
        "learning": fast(updates=updates),
    }
    settled(score_as_action(case, folder, model=model, **defaults | settings)).train()
    return model


def reached(model, case, num_steps):
    """(J, mean, variance) of a policy on even steps."""
    steps = steps_of(model, model.grid(num_steps), case.kernel())
    return [value.item() for value in objective(steps, case.problem.quadratic, case.problem.beta)]


def best(case, num_steps):
    """The same of the optimum of that grid, and J of the reference."""
    model = case.model()
    steps = steps_of(model, model.grid(num_steps), case.kernel())
    reward, beta = case.problem.quadratic, case.problem.beta
    return [value.item() for value in optimum(steps, reward, beta)], objective(steps, reward, beta)[0].item()


def check_optimum(model, case):
    (value, mean, variance), start = best(case, NUM_STEPS)
    found, found_mean, found_variance = reached(model, case, NUM_STEPS)
    assert found <= value + 1e-6  # nothing is better
    assert value - found < 0.02 * (value - start)
    assert found == pytest.approx(value, rel=0.02)
    assert found_mean == pytest.approx(mean, rel=0.02)
    assert found_variance == pytest.approx(variance, rel=0.02)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Policies trained by likelihood, each once."""

    @functools.cache
    def policy(case):
        folder = tmp_path_factory.mktemp("trained")
        return train(case, folder, knots=NUM_STEPS + 1, estimator="likelihood", advantage="gae")

    return policy


@BOTH
def test_training_reaches_the_exact_optimum_of_its_grid(trained, case):
    check_optimum(trained(case), case)


@pytest.mark.parametrize("case", [PRINTED_CASE, OTHER_EULER], ids=["printed", "other, euler-maruyama"])
def test_pathwise_training_reaches_the_same_optimum(tmp_path, case):
    check_optimum(train(case, tmp_path, knots=NUM_STEPS + 1, estimator="pathwise", updates=150), case)


def check_other_grids(model, case):
    """Most of what can be gained on any grid is, and the reward hardly depends on it."""
    quadratic, rewards = case.problem.quadratic, {}
    for num_steps in (25, 50, 100, 200):
        (value, *_), start = best(case, num_steps)
        found, mean, variance = reached(model, case, num_steps)
        rewards[num_steps] = -0.5 * quadratic.q * ((mean - quadratic.c) ** 2 + variance)
        assert value - found < 0.1 * (value - start)
    gain = rewards[50] - reached(case.model(), case, 50)[0]
    change = {num_steps: round((reward - rewards[50]) / gain, 3) for num_steps, reward in rewards.items()}
    print("change of the reward, of what was gained at 50 steps:", change)
    assert max(map(abs, change.values())) < 0.15


@BOTH
def test_what_was_learnt_at_50_steps_holds_at_others(trained, case):
    check_other_grids(trained(case), case)


@BOTH
def test_what_was_learnt_on_grids_that_change_holds_on_all(tmp_path, case):
    """Of 40 to 60 random steps, some of them trained."""
    rollout = case.rollout(300, 40, max_steps=60, spacing="random")
    steps = StepsConfig(train_steps=20)
    settings = {"estimator": "likelihood", "advantage": "return_minus_value", "rollout": rollout, "steps": steps}
    check_other_grids(train(case, tmp_path, knots=26, **settings), case)
