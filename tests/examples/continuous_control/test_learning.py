"""CPG and CPPO against the closed forms of entropy-regularised linear-quadratic control, at two sets of constants."""

import math
from functools import cache

import numpy as np
import pytest
import torch

from examples.continuous_control.lq import (
    LinearPolicy,
    exact_gradient,
    objective,
    optimal_policy,
    optimal_value,
    policy_value,
)
from examples.continuous_control.policy_gradient import ControlConfig, cpg_loss, learn
from examples.continuous_control.rollouts import advantages, draw, fit_critic
from rpo.randomness import keyed_generator
from tests.examples.continuous_control.problems import CASES, DEFAULT, IDS, PROBLEMS

pytestmark = pytest.mark.analytic

STATES = torch.tensor([-2.0, -0.3, 0.7, 1.5], dtype=torch.float64)
EACH = pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
METHODS = ("cpg", "cppo_sqrt", "cppo_linear")


def over_actions(policy):
    """Every state with a fine grid of actions, ten standard deviations to both sides, and the width of its cells."""
    width = 20 * math.sqrt(float(policy.variance)) / 4000
    offsets = torch.linspace(-2000, 2000, 4001, dtype=torch.float64) * width
    x = STATES[:, None].expand(-1, len(offsets))
    return x, policy.actions(x).mean + offsets, width


@cache
def trained(index, method):
    """The updates of one training from a policy far from the optimum; most tests look at the same ones."""
    start = LinearPolicy.of(slope=0.0, intercept=0.0, variance=1.0)
    return list(learn(PROBLEMS[index], start, ControlConfig(method=method)))


def test_the_default_problem_has_the_known_solution():
    best, value = optimal_policy(DEFAULT), optimal_value(DEFAULT)
    assert float(value.second) == pytest.approx(-0.612794, abs=1e-6)
    assert float(best.slope) == pytest.approx(-0.420001, abs=1e-6)
    assert float(best.intercept) == pytest.approx(-0.364512, abs=1e-6)
    assert float(best.variance) == pytest.approx(0.094773, abs=1e-6)
    assert float(value(torch.tensor([0.7], dtype=torch.float64))) == pytest.approx(-0.224417, abs=1e-6)


@EACH
def test_the_optimal_value_solves_the_hamilton_jacobi_bellman_equation(problem):
    x, action, width = over_actions(optimal_policy(problem))
    q = problem.q(x, action, optimal_value(problem))
    soft_maximum = problem.entropy_weight * (torch.logsumexp(q / problem.entropy_weight, dim=1) + math.log(width))
    assert soft_maximum.abs().max() < 1e-8


@EACH
def test_the_optimal_policy_is_the_soft_maximum_of_q_and_has_the_optimal_value(problem):
    best, value = optimal_policy(problem), optimal_value(problem)
    x, action, _ = over_actions(best)
    log_density = problem.q(x, action, value) / problem.entropy_weight
    assert torch.allclose(log_density, best.actions(x).log_prob(action), atol=1e-8)
    assert torch.allclose(policy_value(problem, best)(STATES), value(STATES), atol=1e-10)


@CASES
def test_the_excess_of_q_over_the_entropy_term_is_zero_on_average_in_every_state(problem, policy):
    x, action, width = over_actions(policy)
    log_prob = policy.actions(x).log_prob(action)
    excess = problem.q(x, action, policy_value(problem, policy)) - problem.entropy_weight * log_prob
    assert (excess * log_prob.exp()).sum(dim=1).mul(width).abs().max() < 1e-8


@CASES
@pytest.mark.parametrize("exact_q", [False, True], ids=["q-hat", "exact q"])
def test_the_estimated_policy_gradient_is_the_exact_one(problem, policy, exact_q):
    total, batches = torch.zeros(3, dtype=torch.float64), 5
    for batch in range(batches):
        generator = keyed_generator("gradient", batch)
        seen = draw(
            problem, policy, paths=40_000, actions_per_state=4, path_step=0.02, time_step=0.005, generator=generator
        )
        trainable = policy.copy(is_trainable=True)
        advantage = advantages(problem, policy, seen, exact_q=exact_q)
        total -= torch.autograd.grad(cpg_loss(problem, trainable, seen, advantage), trainable.weights)[0] / batches
    exact = exact_gradient(problem, policy)
    assert (total - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("index", range(len(PROBLEMS)), ids=IDS)
def test_learning_ends_at_the_optimal_policy_and_value(index, method):
    problem, last = PROBLEMS[index], trained(index, method)[-1]
    best = optimal_policy(problem)
    assert float(last.policy.slope) == pytest.approx(float(best.slope), rel=0.02)
    assert float(last.policy.intercept) == pytest.approx(float(best.intercept), rel=0.02)
    assert float(last.policy.variance) == pytest.approx(float(best.variance), rel=0.02)
    assert last.value == pytest.approx(float(objective(problem, best)), rel=0.02)


@EACH
def test_the_critic_of_the_learnt_policy_is_the_optimal_value(problem):
    policy = trained(PROBLEMS.index(problem), "cppo_sqrt")[-1].policy
    generator = keyed_generator("critic")
    seen = draw(
        problem, policy, paths=20_000, actions_per_state=4, path_step=0.05, time_step=0.005, generator=generator
    )
    exact = optimal_value(problem)(STATES)
    assert (fit_critic(problem, seen)(STATES) - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize("index", range(len(PROBLEMS)), ids=IDS)
def test_the_square_root_penalty_moves_by_fits_and_starts(index):
    def unevenness(method):
        climb = trained(index, method)[5:20]  # after C has found its size, and before the optimum
        return np.std([np.log(update.sqrt_kl / update.target) for update in climb])

    assert unevenness("cppo_sqrt") > 3 * unevenness("cppo_linear")
