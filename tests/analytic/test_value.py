"""The value that is learnt is the one that is known: of a policy that is not optimal, and of the optimum."""

import pytest
import torch
from torch import nn

from rpo.trainers.value.inputs import value_nodes
from tests.analytic.closed_forms import OTHER, PRINTED, optimal_value
from tests.analytic.linear_quadratic import (
    Case,
    ExactValue,
    moments,
    node_times,
    score_as_action,
    steps_of,
    value_config,
    values_of,
)
from tests.analytic.test_grid_invariance import cosine
from tests.analytic.toys import LinearCorrection, OptimalControl, ToyModel

pytestmark = pytest.mark.analytic


class Quadratic(nn.Module):
    """Quadratic in x_t at every node of a grid, by Hermite polynomials of what the policy makes of x_t there."""

    def __init__(self, times, mean, variance):
        super().__init__()
        for name, values in (("times", times), ("mean", mean.detach()), ("std", variance.detach().sqrt())):
            self.register_buffer(name, values.float())
        self.weight = nn.Parameter(torch.zeros(len(times), 3))

    def forward(self, points):
        node = (points.time[:, None] - self.times).abs().argmin(dim=1)
        u = (points.x_t.flatten() - self.mean[node]) / self.std[node]
        return (self.weight[node] * torch.stack([torch.ones_like(u), u, u**2 - 1], dim=1)).sum(dim=1)


def learnt(case, folder, *, rows, num_steps, policy, estimator="likelihood_state_cost", **value):
    """A trainer that has fitted V to some rollouts of a policy that stays."""
    grid = policy.grid(num_steps)
    *_, mean, variance = moments(steps_of(policy, grid, case.kernel()))
    trainer = score_as_action(
        case,
        folder,
        model=ToyModel(policy.prior, policy.process, LinearCorrection(*policy.prior.means), policy.prediction_type),
        estimator=estimator,
        rollout=case.rollout(1, num_steps, prompts=rows),
        value=value_config(updates=UPDATES, batch_size=40_000, learning_rate=0.03, **value),
        network=Quadratic(node_times(grid, policy.num_train_timesteps), mean, variance),
    )
    trainer.run.model.denoiser.correction = policy.denoiser.correction
    for index in range(ROLLOUTS):
        trainer.algorithm.collect(index)
    return trainer


def distance(trainer, known):
    """Relative error of V over the nodes of a new rollout, but for the last."""
    rollout = trainer.algorithm.collector.draw(1000)
    nodes = value_nodes(trainer.run.model, rollout, range(rollout.trajectory.grid.num_steps))
    truth = known(nodes)
    return ((trainer.algorithm.value.evaluate(nodes, batch_size=10_000) - truth).norm() / truth.norm()).item()


def exact(trainer, case):
    grid = trainer.algorithm.collector.rollouts.grid(0)
    steps = steps_of(trainer.run.model, grid, case.kernel())
    value = ExactValue(node_times(grid, 1000), values_of(steps, case.problem.quadratic, case.problem.beta))
    return lambda nodes: value.at(nodes.x_t, nodes.time)


UPDATES, ROLLOUTS = 180, 2

CASES = {
    "vp, ddim": Case(PRINTED, (0.3, -0.2)),
    "other flow, ddim": Case(OTHER, (-0.25, 0.35), "flow"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("trace", [0.0, 0.7, 1.0])
def test_learns_the_value_of_a_policy_that_is_not_optimal(tmp_path, case, trace):
    policy = case.model(LinearCorrection(*case.problem.prior.means, case.theta))
    trainer = learnt(case, tmp_path, rows=16_000, num_steps=10, policy=policy, trace=trace)
    assert distance(trainer, exact(trainer, case)) < 0.02


@pytest.mark.parametrize("problem", [PRINTED, OTHER], ids=["printed", "other"])
def test_learns_the_optimal_value(tmp_path, problem):
    """Under the optimal policy, where the reward less the log-ratio still to come is the optimal value itself."""
    case = Case(problem, (0.0, 0.0), solver="euler_maruyama")
    control = OptimalControl(problem.prior, problem.quadratic, problem.beta, 1.0)
    model = ToyModel(problem.prior, cosine(), control)
    trainer = learnt(case, tmp_path, rows=500, num_steps=200, policy=model, estimator="likelihood")

    def known(nodes):
        t = (nodes.time.double() + 1 / model.num_train_timesteps).clamp(max=1)[:, None, None, None]
        at = model.process.alpha(t), model.process.sigma(t)
        problem_of = {"prior": problem.prior, "reward": problem.quadratic, "beta": problem.beta, "eta": 1.0}
        return optimal_value(nodes.x_t.double(), *at, **problem_of).flatten().float()

    assert distance(trainer, known) < 0.02
