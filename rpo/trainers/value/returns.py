"""What came of every step of a rollout: its cost against the reference, V along the path, and the advantage.

V is asked only where it is needed, from the first trained step to the end of the last. What lies after that is one long
step to the data end, with all of its costs: what a step is worth includes the costs it leads to.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rpo.models.base import DiffusionModel
from rpo.objectives.advantages import MAX_ADVANTAGE, gae, normalize_per_step, return_minus_value, value_difference
from rpo.rewards.base import check_finite
from rpo.trainers.rollouts.collector import Collector
from rpo.trainers.rollouts.draw import Rollout
from rpo.trainers.value.estimator import ValueEstimator
from rpo.trainers.value.inputs import ValuePoints, compared_with_others, value_nodes
from rpo.trainers.value.network import ValueNetwork
from rpo.trainers.value.settings import ValueConfig
from rpo.training.processes import Processes
from rpo.types import Latents, PerSample

NORMALIZE_EPS = 1e-8
"""Added to the spread that advantages are divided by."""

LEAST_SPREAD = 1e-6
"""What differs by less differs by rounding: nothing is divided by such a spread."""

PRETRAIN_UPDATES = 100
"""Optimiser steps on V for each rollout from which it is learnt before the policy moves."""


@dataclass(frozen=True)
class PathReturns:
    """A rollout with everything that came of its trained part."""

    rollout: Rollout
    first: int
    """The first trained step."""
    costs: Float[Tensor, "steps images"]
    """Of every step from there, times `kl_weight`; the last counts for all that follows the trained part."""
    values: Float[Tensor, "nodes images"]
    """V at the nodes between them, or what images are compared with; the reward at the last. Of an image that could not
    be judged some are NaN, and all mean nothing."""
    nodes: ValuePoints | None
    """These nodes, with what the reward says of their predicted images; nothing without V."""


def path_returns(
    rollout: Rollout,
    chosen: Int[Tensor, "trained images"],
    every_cost: Float[Tensor, "steps images"],
    value: ValueEstimator | None,
    model: DiffusionModel,
    *,
    batch_size: int,
) -> PathReturns:
    """Costs and values of the trained part of a rollout.

    Args:
        chosen: Which steps are trained.
        every_cost: What every step of the rollout costs, times `kl_weight`.
        value: V; None compares each image with the others of its prompt.
    """
    end = rollout.trajectory.grid.num_steps
    first, last = int(chosen.min()), int(chosen.max()) + 1
    costs = every_cost[first:last]
    if last < end:
        costs = torch.cat([costs, every_cost[last:].sum(dim=0, keepdim=True)])
    if value is None:
        others = compared_with_others(rollout.rewards, rollout.group)
        values = torch.cat([others.expand(len(costs), -1), rollout.rewards[None]])
        return PathReturns(rollout, first, costs, values, None)
    kept = [*range(first, last + 1), *([end] if last < end else [])]
    nodes = value.ask_reward(value_nodes(model, rollout, kept), batch_size=batch_size)
    values = value.evaluate(nodes, batch_size=batch_size).view(len(kept), -1)
    return PathReturns(rollout, first, costs, torch.cat([values[:-1], rollout.rewards[None]]), nodes)


def advantages(
    returns: PathReturns, kind: Literal["value_difference", "return_minus_value", "gae", "group"], *, trace: float
) -> Float[Tensor, "steps images"]:
    """What each step from the first trained one on is worth, in the unit of the reward."""
    if kind == "gae":
        return gae(returns.values, returns.costs, trace=trace)
    if kind == "value_difference":
        return value_difference(returns.values, returns.costs)
    return return_minus_value(returns.values, returns.costs)


def scaled(
    advantage: Float[Tensor, "steps images"],
    how: Literal["none", "batch", "per_step"],
    processes: Processes,
    judged: Bool[Tensor, " images"],
) -> tuple[Float[Tensor, "steps images"], Float[Tensor, "steps images"]]:
    """Advantages in the unit that the settings ask for, and what they were divided by.

    Args:
        judged: Which images have a score; the advantage of the others is 0, and in no spread.
    """
    if how == "none":
        return torch.where(judged, advantage, 0.0), torch.ones_like(advantage)
    everyone, is_judged = processes.join(advantage, dim=1), processes.join(judged.float()) > 0
    known = everyone[:, is_judged]
    spread = known.std() if how == "batch" else known.std(dim=1, correction=0, keepdim=True)
    scale = torch.where(spread > LEAST_SPREAD, spread + NORMALIZE_EPS, 1.0).expand_as(everyone)
    known = known / scale[:, is_judged] if how == "batch" else normalize_per_step(known)
    result = torch.zeros_like(everyone)
    result[:, is_judged] = known.clamp(-MAX_ADVANTAGE, MAX_ADVANTAGE)
    return processes.own(result, dim=1), processes.own(scale, dim=1)


def make_value(
    collector: Collector, config: ValueConfig, network: nn.Module | None = None, *, is_differentiable: bool
) -> ValueEstimator:
    """V for what a collector draws; its rewards are asked about the predicted clean image, if the settings say so.

    Args:
        network: F, from `ValuePoints` to one number each; the package's own by default.
        is_differentiable: Whether the slope of V is asked for.
    """
    model, rollouts, seed = collector.run.model, collector.rollouts, collector.config.seed
    rewards, evidence, may_fail = rollouts.rewards, rollouts.failed.evidence, rollouts.failed.most > 0
    if network is None:
        shape, prompt_dim = model.latent_shape(rollouts.canvas), model.encode_prompts(["a"]).tokens.shape[-1]
        network = ValueNetwork(shape, prompt_dim, sees_latents=config.sees_latents, seed=seed).to(model.device)

    def terminal(latents: Latents, prompts: Sequence[str]) -> PerSample:
        images = model.decode(latents)
        if torch.is_grad_enabled():
            followed = rewards.with_gradient(images, prompts)
            check_finite(followed.detach(), may_fail=may_fail)
            return followed
        answers = rewards.ask(images, prompts, evidence=evidence, may_fail=may_fail)
        return rewards.weighted_sum({name: one.values for name, one in answers.items()})

    return ValueEstimator(
        network,
        terminal=terminal if config.uses_reward else None,
        is_differentiable=is_differentiable,
        reward_until=config.reward_until,
        learning_rate=config.learning_rate,
        seed=seed,
        processes=collector.run.processes,
    )


def fit_value(
    value: ValueEstimator | None, returns: PathReturns, config: ValueConfig, *, updates: int
) -> dict[str, Tensor]:
    """Fit V to a rollout, after it has been used; says how good it was on it."""
    if value is None or returns.nodes is None:
        return {}
    return value.fit_paths(
        returns.nodes,
        returns.values,
        returns.costs,
        returns.rollout.judged,
        trace=config.trace,
        steps=updates,
        batch_size=config.batch_size,
    )
