"""The likelihood gradient averaged over the paths to an image: exact where the policy reverses the noising process."""

import numpy as np
import pytest
import torch
from torch import nn

from rpo.objectives.endpoint.bound import endpoint as loss_of_endpoint
from rpo.process.prediction import add_noise, to_x0_eps
from rpo.trainers.endpoint import HOLD
from rpo.trainers.rollouts.settings import StepsConfig
from rpo.types import Node
from tests.analytic.chains import all_nodes
from tests.analytic.closed_forms import OTHER, PRINTED
from tests.analytic.linear_quadratic import (
    Case,
    double,
    error,
    exact_gradient,
    gradient,
    moments,
    move,
    objective,
    score_as_action,
    steps_of,
    value_config,
)
from tests.analytic.linear_quadratic import endpoint as toy_endpoint
from tests.analytic.test_training import Piecewise, fast, settled
from tests.analytic.toys import OptimalControl, ToyModel

pytestmark = pytest.mark.analytic

AT_REFERENCE = {
    "vp": Case(PRINTED, (0.0, 0.0)),
    "other vp": Case(OTHER, (0.0, 0.0)),
    "flow": Case(PRINTED, (0.0, 0.0), "flow"),
}
NUM_STEPS, ROWS = 300, 10_000
"""It knows the continuous process, not the grid: what is left is the first order of the steps."""


def endpoint(case, folder, *, rows=ROWS, num_steps=NUM_STEPS, train_steps=16, **settings):
    given = {"steps": StepsConfig(train_steps=train_steps), "rollout": case.rollout(rows, num_steps)}
    return toy_endpoint(case, folder, **given | settings)


@pytest.mark.parametrize("case", AT_REFERENCE.values(), ids=AT_REFERENCE)
def test_it_is_the_exact_gradient_at_the_reference(tmp_path, case):
    trainer = endpoint(case, tmp_path)
    exact = exact_gradient(trainer, case, move(trainer, case))
    found = torch.stack([-gradient(trainer, trainer.algorithm.loss, index) for index in range(3)]).mean(dim=0)
    assert error(found, exact) < 0.03


def test_at_the_reference_the_clip_holds_nothing_back(tmp_path):
    case, gradients = AT_REFERENCE["vp"], []
    for clip in (None, 0.3):
        trainer = endpoint(case, tmp_path / str(clip), rows=1000, num_steps=50, clip=clip)
        move(trainer, case)
        gradients.append(gradient(trainer, trainer.algorithm.loss, 0))
    assert error(gradients[1], gradients[0]) < 1e-5


def test_a_value_of_every_noised_moment_leaves_the_gradient_as_it_is(tmp_path):
    case = AT_REFERENCE["vp"]
    trainer = endpoint(case, tmp_path, baseline="value", value=value_config())
    exact = exact_gradient(trainer, case, move(trainer, case))  # which gives it the value of the nearest node
    found = torch.stack([-gradient(trainer, trainer.algorithm.loss, index) for index in range(3)]).mean(dim=0)
    assert error(found, exact) < 0.03


def test_an_ode_may_draw_the_images(tmp_path):
    case = AT_REFERENCE["vp"]
    trainer = endpoint(case, tmp_path, rollout=case.rollout(ROWS, NUM_STEPS, eta=0.0))
    exact = exact_gradient(trainer, case, move(trainer, case))
    found = torch.stack([-gradient(trainer, trainer.algorithm.loss, index) for index in range(3)]).mean(dim=0)
    assert error(found, exact) < 0.03


def test_it_has_less_noise_than_the_path(tmp_path):
    """In one dimension half; what is averaged away grows with the number of dimensions."""
    case = AT_REFERENCE["vp"]
    spreads = []
    rollout = case.rollout(64, 40)
    for trainer in (
        toy_endpoint(case, tmp_path / "endpoint", rollout=rollout),
        score_as_action(case, tmp_path / "likelihood", advantage="group", rollout=rollout),
    ):
        move(trainer, case)
        found = torch.stack([gradient(trainer, trainer.algorithm.loss, index) for index in range(40)])
        spreads.append(found.var(dim=0).sum().item())
    assert spreads[0] < 0.6 * spreads[1]


@pytest.mark.timeout(900)
def test_training_reaches_the_tilted_law(tmp_path):
    """The law of 400 steps: what each step is off adds up where a policy learns from its own images (5 % at 150)."""
    case = AT_REFERENCE["vp"]
    model = case.model(Piecewise(*case.problem.prior.means, 26))
    learning = fast(updates=200)
    trainer = endpoint(case, tmp_path, rows=100, num_steps=400, train_steps=None, model=model, learning=learning)
    settled(trainer).train()
    steps = steps_of(model, model.grid(1000), case.kernel())
    _, mean, variance = objective(steps, case.problem.quadratic, case.problem.beta)
    assert mean.item() == pytest.approx(0.9727, rel=0.03)
    assert variance.item() == pytest.approx(0.1818, rel=0.05)


class Smooth(nn.Module):
    """A change of score that is linear in x_t and a polynomial in time: no step can be tuned alone."""

    def __init__(self, mean: float, degree: int):
        super().__init__()
        self.mean, self.theta = mean, nn.Parameter(torch.zeros(2, degree + 1))

    def forward(self, x_t, alpha, sigma, time):
        angle = torch.acos((2 * time - 1).clamp(-1, 1))
        intercept, slope = (sum(c * torch.cos(k * angle) for k, c in enumerate(row)) for row in self.theta)
        return intercept + slope * (x_t - alpha * self.mean)


class Dial(nn.Module):
    """A share of another correction: 0 is the reference, 1 all of it."""

    def __init__(self, correction: nn.Module):
        super().__init__()
        self.correction, self.share = correction, nn.Parameter(torch.zeros(()))

    def forward(self, *moment):
        return self.share * self.correction(*moment)


def at_the_optimum(case, folder, **settings):
    """A trainer whose policy is the optimum, and its reference still the data's own score."""
    problem = case.problem
    model = case.model(Dial(OptimalControl(problem.prior, problem.quadratic, problem.beta, 1.0)))
    trainer = endpoint(case, folder, rows=2000, num_steps=300, train_steps=None, model=model, **settings)
    model.denoiser.correction.share.data.fill_(1.0)
    return trainer


@pytest.mark.parametrize("case", AT_REFERENCE.values(), ids=AT_REFERENCE)
def test_at_the_tilted_law_every_image_is_worth_the_same(tmp_path, case):
    """What r/kl_weight says of an image is then the log-ratio, and no slope of the advantage by the reward is left."""
    trainer = at_the_optimum(case, tmp_path)
    advantage = trainer.algorithm.collect(0)["advantage"]
    reward = trainer.algorithm.collector.rollout.rewards
    centred = reward - reward.mean()
    slope = (advantage[: len(reward)] * centred).mean() / centred.square().mean()
    assert slope == pytest.approx(0, abs=0.15)  # 1 without a cost


def test_the_kl_that_is_logged_is_that_of_the_path(tmp_path):
    case = AT_REFERENCE["vp"]
    trainer = at_the_optimum(case, tmp_path, clip=0.3)
    with torch.no_grad():
        logged = trainer.algorithm.loss(trainer.algorithm.collect(0)).metrics["policy/kl"].item()
    steps = steps_of(trainer.run.model, double(trainer.run.model.grid(1000)), case.kernel())
    assert logged == pytest.approx(moments(steps)[0].sum().item(), rel=0.2)


@pytest.mark.parametrize("case", AT_REFERENCE.values(), ids=AT_REFERENCE)
def test_the_expected_gradient_leads_smooth_policies_to_the_optimum(case):
    """By quadrature over x_0 and the noise, so that nothing but the formula is tried."""
    problem, kernel = case.problem, case.kernel()
    model = case.model(Smooth(problem.prior.means[0], 4).double())
    grid = double(model.grid(40))
    optimizer = torch.optim.Adam(model.denoiser.parameters(), lr=0.05, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1 - update / 600)
    start = objective(steps_of(model, grid, kernel), problem.quadratic, problem.beta)[0].item()
    for _ in range(600):
        optimizer.zero_grad()
        expected_loss(model, grid, case).backward()
        optimizer.step()
        decay.step()
    reached = objective(steps_of(model, grid, kernel), problem.quadratic, problem.beta)[0].item()
    optimum = case.model(OptimalControl(problem.prior, problem.quadratic, problem.beta, 1.0))
    best = objective(steps_of(optimum, grid, kernel), problem.quadratic, problem.beta)[0].item()
    assert reached > best - 0.05 * (best - start)


def expected_loss(model, grid, case):
    """The mean of an image's loss over all images and noise, by Gauss-Hermite sums."""
    problem, kernel = case.problem, case.kernel()
    _, means, variances = moments(steps_of(model, grid, kernel))
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    nodes, weights = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    x_0, eps = (means[-1] + variances[-1].sqrt() * nodes).detach(), nodes
    shape = (grid.num_steps - 1, len(x_0), len(eps))  # the last step adds no noise
    t, s = (
        Node(*(v[:-1, ..., 0].expand(shape).reshape(-1, 1, 1, 1) for v in vars(node).values()))
        for node in all_nodes(grid)
    )
    x_0, eps = (v.expand(shape).reshape(-1, 1, 1, 1) for v in (x_0[:, None], eps))
    bounds = []
    for network in (model, ToyModel(model.prior, model.process, None, model.prediction_type)):
        x_t = add_noise(x_0, eps, t)
        noise_pred = network.predict(x_t, t.timestep.flatten(), network.encode_prompts([""]))
        policy = kernel(*to_x0_eps(noise_pred, x_t, t, model.prediction_type), t, s)
        bounds.append(kernel(x_0, eps, t, s).kl(policy))
    bound, reference = ((part.view(shape) @ weights).sum(dim=0) for part in bounds)
    returns = problem.quadratic(x_0.view(shape)[0, :, 0]) - problem.beta * (reference - bound).detach()
    advantage = returns - returns @ weights + HOLD * problem.beta
    return weights @ loss_of_endpoint(bound, advantage)
