"""A linear policy on the toy, whose objective, value and gradient are exact for every grid, kernel and noise level.

Every step is x_s = slope x_t + offset + std z and costs ½ weight (a x_t + b)², all affine in the policy's parameters or
squares of that, and the reward is at most quadratic. So J and V are recursions over the steps, which autograd
differentiates: what the trainers estimate from rollouts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rpo.objectives.endpoint.bound import Bound
from rpo.process.continuous import running_cost
from rpo.process.schedule import RectifiedFlow
from rpo.process.transition import Ddim, EulerMaruyama, Kernel
from rpo.trainers.endpoint import Endpoint
from rpo.trainers.endpoint_config import EndpointConfig
from rpo.trainers.rollouts.settings import OnlineLearningConfig, RolloutConfig
from rpo.trainers.rollouts.steps import Steps as DrawnSteps
from rpo.trainers.score_as_action import ScoreAsAction
from rpo.trainers.score_as_action_config import ScoreAsActionConfig
from rpo.trainers.settings import AdapterConfig
from rpo.trainers.trainer import Trainer
from rpo.trainers.value.estimator import ValueEstimator
from rpo.trainers.value.inputs import ValuePoints
from rpo.trainers.value.settings import ValueConfig
from rpo.types import Grid, StepOutput
from tests.analytic.chains import affine, predictions
from tests.analytic.closed_forms import Linear, Problem, Reward
from tests.analytic.toys import ImageReward, LinearCorrection, ToyModel, linear_vp


@dataclass(frozen=True)
class Steps:
    """Of every step of a grid: where it leads, and its cost ½ weight (a x + b)²; differentiable."""

    slope: Tensor
    offset: Tensor
    std: Tensor
    weight: Tensor
    a: Tensor
    b: Tensor

    def detached(self, *names: str) -> "Steps":
        """The same, some of it constant."""
        return Steps(**{name: value.detach() if name in names else value for name, value in vars(self).items()})


def double(grid: Grid) -> Grid:
    """The grid in float64."""
    return Grid(*(values.double() for values in vars(grid).values()))


def steps_of(model: ToyModel, grid: Grid, kernel: Kernel) -> Steps:
    """What a kernel makes of a model's predictions, against those of the data's own score."""
    grid = double(grid)
    reference = ToyModel(model.prior, model.process, None, model.prediction_type)
    x0_hat, eps_hat, t, s = predictions(model, grid)
    x0_ref, eps_ref, _, _ = predictions(reference, grid)
    step, step_ref = kernel(x0_hat, eps_hat, t, s), kernel(x0_ref, eps_ref, t, s)
    slope, offset = affine(step.mean)
    std = step.std.flatten()[: grid.num_steps] if step.std.ndim else step.std.expand(grid.num_steps)
    if kernel.has_density:
        a, b = affine(step.mean - step_ref.mean)
        weight = torch.where(std > 0, std, torch.inf) ** -2
    else:
        a, b = affine(eps_hat - eps_ref)
        weight = 2 * running_cost(torch.ones_like(eps_hat), torch.zeros_like(eps_hat), t, s, eta=0.0)[: grid.num_steps]
    return Steps(slope, offset, std, weight, a, b)


def trained(steps: Steps) -> Steps:
    """The steps as trainers see them: the last is constant where a kernel with a density adds no noise in it."""
    if steps.std[-1] > 0 or steps.std[0] == 0:
        return steps
    return Steps(**{name: torch.cat([v[:-1], v[-1:].detach()]) for name, v in vars(steps).items()})


def reward_terms(reward: Reward) -> tuple[float, float, float]:
    """(P, p, c) of r = -½ P x² + p x + c."""
    return (0.0, reward.a, 0.0) if isinstance(reward, Linear) else (reward.q, reward.q * reward.c, reward(0.0))


def moments(steps: Steps) -> tuple[Tensor, Tensor, Tensor]:
    """(cost of every step, mean and variance of x at every node) from unit noise."""
    mean, variance = [torch.zeros((), dtype=torch.float64)], [torch.ones((), dtype=torch.float64)]
    costs = []
    for slope, offset, std, weight, a, b in zip(*vars(steps).values(), strict=True):
        costs.append(0.5 * weight * ((a * mean[-1] + b) ** 2 + a**2 * variance[-1]))
        mean.append(slope * mean[-1] + offset)
        variance.append(slope**2 * variance[-1] + std**2)
    return torch.stack(costs), torch.stack(mean), torch.stack(variance)


def objective(steps: Steps, reward: Reward, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """(J, mean of x_0, variance of x_0) from unit noise."""
    costs, means, variances = moments(steps)
    mean, variance = means[-1], variances[-1]
    P, p, c = reward_terms(reward)
    return -0.5 * P * (variance + mean**2) + p * mean + c - beta * costs.sum(), mean, variance


def values_of(steps: Steps, reward: Reward, beta: float) -> Tensor:
    """(P, p, c) of V = -½ P x² + p x + c at every node, [nodes, 3]."""
    P, p, c = (torch.tensor(term, dtype=torch.float64) for term in reward_terms(reward))
    terms = [torch.stack([P, p, c])]
    for slope, offset, std, weight, a, b in zip(*(v.detach().flip(0) for v in vars(steps).values()), strict=True):
        c = c + p * offset - 0.5 * P * (offset**2 + std**2) - 0.5 * beta * weight * b**2
        p = slope * (p - P * offset) - beta * weight * a * b
        P = slope**2 * P + beta * weight * a**2
        terms.append(torch.stack([P, p, c]))
    return torch.stack(terms[::-1])


class ExactValue(nn.Module):
    """F of a value such that V is exact at the nodes of a grid; of an image with several samples, their mean."""

    def __init__(self, times: Tensor, terms: Tensor):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))
        self.register_buffer("times", times.float())
        self.register_buffer("terms", terms.float())

    def at(self, x_t: Tensor, time: Tensor) -> Tensor:
        """V."""
        P, p, c = self.terms[self.node(time)].unbind(dim=1)
        x = x_t.flatten(1)
        return (-0.5 * P[:, None] * x**2 + p[:, None] * x).mean(dim=1) + c

    def node(self, time: Tensor) -> Tensor:
        """Which node each time is nearest to."""
        return (time[:, None] - self.times).abs().argmin(dim=1)

    def forward(self, points: ValuePoints) -> Tensor:
        value = self.at(points.x_t, points.time)
        return value if points.baseline is None else value - points.baseline


def node_times(grid: Grid, num_train_timesteps: int) -> Tensor:
    """What a value is told of every node."""
    return torch.cat([grid.timestep[:-1].float() / num_train_timesteps, torch.zeros(1)])


def plug(value: ValueEstimator, network: nn.Module) -> None:
    """Make V = baseline + F with F a network that is right already."""
    value.network = network
    value._mean, value._std = 0.0, 1.0


def gradient(trainer: Any, loss: Callable[[DrawnSteps], StepOutput], index: int = 0) -> Tensor:
    """What one rollout says of -dJ/dtheta, over the micro-batches that training would take it in; flat."""
    parameters, (_, accumulate) = trainer.run.policy.parameters, trainer.algorithm.division
    stream = trainer.algorithm.batches(index)
    for parameter in parameters:
        parameter.grad = None
    for _ in range(accumulate):
        (loss(next(stream)).loss / accumulate).backward()
    return torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])


@dataclass(frozen=True)
class Case:
    """A problem with its process, kernel and policy."""

    problem: Problem
    theta: tuple[float, float]
    family: Literal["vp", "flow"] = "vp"
    solver: Literal["ddim", "euler_maruyama"] = "ddim"
    eta: float = 1.0

    def model(self, correction: nn.Module | None = None, *, width: int = 1) -> ToyModel:
        """The toy with its reference policy."""
        problem = self.problem
        correction = correction or LinearCorrection(problem.prior.means[0])
        if self.family == "flow":
            process, kind = RectifiedFlow(start=0.98), "flow"
        else:
            process, kind = linear_vp(*problem.betas), "epsilon"
        return ToyModel(problem.prior, process, correction, kind, latent_shape=(1, 1, width))

    def rollout(self, rows: int, num_steps: int, **changes: Any) -> RolloutConfig:
        """Rollouts of one prompt."""
        settings: dict[str, Any] = {
            "prompts": 1,
            "images_per_prompt": rows,
            "num_steps": num_steps,
            "spacing": "uniform",
            "solver": self.solver,
            "eta": self.eta,
            "guidance_scale": 1.0,
            "batch_size": ALL,
        }
        return RolloutConfig(**settings | changes)

    def kernel(self) -> Kernel:
        """Of its rollouts."""
        return Ddim(self.eta) if self.solver == "ddim" else EulerMaruyama(self.eta)


ALL = 10**7
"""Of anything at once."""

FULL = AdapterConfig(train="full")


def value_config(**changes: Any) -> ValueConfig:
    """A value that is learnt alone, or not at all."""
    settings = {"uses_reward": False, "sees_latents": True, "updates": 0, "pretrain_rollouts": 0, "batch_size": ALL}
    return ValueConfig(**settings | changes)


def score_as_action(
    case: Case,
    folder: Path,
    *,
    width: int = 1,
    model: ToyModel | None = None,
    network: nn.Module | None = None,
    **settings: Any,
) -> Any:
    """A trainer of the toy with a quadratic reward, everything in one micro-batch, at theta = 0.

    Args:
        case: The problem.
        folder: Of the run.
        width: Samples per image, each with its own cost: for what is linear in V.
        model: The toy, with its reference policy.
        network: F of the value.
        **settings: Of `ScoreAsActionConfig`.
    """
    given = shared(case, folder, width=width) | {"advantage": "value_difference", "normalize": "none"}
    config = ScoreAsActionConfig(**given | settings)
    network = network or ExactValue(torch.zeros(1), torch.zeros(1, 3))
    algorithm = ScoreAsAction(ImageReward(case.problem.quadratic), ["x"], config, value_network=network)
    return Trainer(model or case.model(width=width), algorithm)


def endpoint(case: Case, folder: Path, *, model: ToyModel | None = None, **settings: Any) -> Any:
    """The same by the endpoint gradient, with no limit to how far an image is pushed."""
    own = {name: settings.pop(name) for name in ("baseline", "scale", "consistency", "clip") if name in settings}
    objective = Bound(**{"scale": "none", "clip": None} | own)
    config = EndpointConfig(**shared(case, folder) | {"objective": objective} | settings)
    return Trainer(model or case.model(), Endpoint(ImageReward(case.problem.quadratic), ["x"], config))


def shared(case: Case, folder: Path, *, width: int = 1) -> dict[str, Any]:
    """The settings of every trainer of the toy."""
    return {
        "kl_weight": case.problem.beta / width,
        "value": value_config(),
        "learning": OnlineLearningConfig(micro_batch=ALL),
        "adapter": FULL,
        "preview_every": 0,
        "preflight": False,
        "output": str(folder),
    }


def move(trainer: Any, case: Case) -> Steps:
    """Put the policy where the case has it, with its exact value, on the grid of the first rollout."""
    model = trainer.run.model
    model.denoiser.correction.theta.data = torch.tensor(case.theta)
    grid = trainer.algorithm.collector.rollouts.grid(0)
    steps = trained(steps_of(model, grid, case.kernel()))
    if getattr(trainer.algorithm, "value", None) is not None:
        terms = values_of(steps, case.problem.quadratic, case.problem.beta)
        plug(trainer.algorithm.value, ExactValue(node_times(grid, model.num_train_timesteps), terms))
    return steps


def exact_gradient(trainer: Any, case: Case, steps: Steps) -> Tensor:
    """dJ/dtheta."""
    value = objective(steps, case.problem.quadratic, case.problem.beta)[0]
    return torch.autograd.grad(value, trainer.run.policy.parameters[0], retain_graph=True)[0]


def error(found: Tensor, expected: Tensor) -> float:
    """Relative distance."""
    return ((found - expected).norm() / expected.norm()).item()
