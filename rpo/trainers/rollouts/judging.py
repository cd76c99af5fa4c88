"""What every step of a rollout is worth: its cost against the reference, V along the path, and the advantage.

V is asked only where it is needed, from the first trained step to the end of the last. What lies after that is one long
step to the data end, with all of its costs: what a step is worth includes the costs it leads to.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rpo.models.base import DiffusionModel
from rpo.objectives.advantages import gae, normalize_per_step, return_minus_value, value_difference
from rpo.objectives.score_as_action import log_ratio_cost
from rpo.rewards.base import WeightedRewards
from rpo.trainers.online import OnlineRun
from rpo.trainers.policy import Policy
from rpo.trainers.rollouts.draw import Rollout
from rpo.trainers.rollouts.moments import (
    reference_prediction,
    required_others_mean,
    step_cost,
    transition_of,
    value_gradient,
    value_nodes,
)
from rpo.trainers.rollouts.points import Points, points_of
from rpo.trainers.score_as_action_config import ScoreAsActionConfig, ValueConfig
from rpo.trainers.value.estimator import Critic
from rpo.trainers.value.inputs import ValuePoints
from rpo.trainers.value.network import ValueNetwork
from rpo.training.processes import Processes
from rpo.types import Latents, PerSample

NORMALIZE_EPS = 1e-8
"""Added to the spread that advantages are divided by."""


@dataclass(frozen=True)
class Judged:
    """A rollout with everything that its trained part is worth."""

    rollout: Rollout
    first: int
    """The first trained step."""
    costs: Float[Tensor, "steps images"]
    """Of every step from there, times `kl_weight`; the last counts for all that follows the trained part."""
    values: Float[Tensor, "nodes images"] | None
    """V at the nodes between them; the reward at the last."""
    nodes: ValuePoints | None
    """These nodes, with what the reward says of their predicted images."""
    references: Float[Tensor, "steps images c h w"] | None
    """Guided output of the reference at every step of the whole rollout."""


def make_critic(
    model: DiffusionModel,
    rewards: WeightedRewards,
    config: ValueConfig,
    network: nn.Module | None,
    *,
    seed: int,
    evidence: Path,
    processes: Processes,
) -> Critic:
    """V for a model and its rewards.

    Args:
        rewards: Asked about the predicted clean image, if the design has a place for that.
        seed: Of its first weights and the order of its data.
    """
    if network is None:
        prompt_dim = model.encode_prompts(["a"]).tokens.shape[-1]
        network = ValueNetwork(
            model.latent_shape(), prompt_dim, inputs=config.inputs, channels=config.channels, seed=seed
        ).to(model.device)

    def terminal(latents: Latents, prompts: Sequence[str]) -> PerSample:
        images = model.decode(latents)
        if torch.is_grad_enabled():
            return rewards.with_gradient(images, prompts)
        return rewards.weighted_sum(rewards.parts(images, prompts, evidence=evidence))

    return Critic(
        network,
        design=config.design,
        terminal=None if config.design == "none" else terminal,
        branch=config.branch,
        reward_until=config.reward_until,
        learning_rate=config.learning_rate,
        seed=seed,
        processes=processes,
    )


def judge(
    rollout: Rollout,
    steps: Int[Tensor, "trained images"],
    policy: Policy,
    critic: Critic | None,
    config: ScoreAsActionConfig,
    *,
    guidance_scale: float,
    batch_size: int,
) -> Judged:
    """What the steps of a rollout cost, and V at its nodes."""
    end = rollout.trajectory.grid.num_steps
    first, last = int(steps.min()), int(steps.max()) + 1
    every, references = _costs(rollout, policy, config, guidance_scale, batch_size)
    costs = every[first:last]
    if last < end:
        costs = torch.cat([costs, every[last:].sum(dim=0, keepdim=True)])
    values, nodes = None, None
    if critic is not None:
        kept = [*range(first, last + 1), *([end] if last < end else [])]
        nodes = critic.ask_reward(value_nodes(policy.model, rollout, kept), batch_size=batch_size)
        values = critic.evaluate(nodes, batch_size=batch_size).view(len(kept), -1)
        values = torch.cat([values[:-1], rollout.rewards[None]])
    return Judged(rollout, first, costs, values, nodes, references)


def _costs(
    rollout: Rollout, policy: Policy, config: ScoreAsActionConfig, guidance_scale: float, batch_size: int
) -> tuple[Tensor, Tensor | None]:
    """What every step costs, [steps, images], and the reference's outputs."""
    model, kernel = policy.model, config.rollout_kernel
    num_steps, images = rollout.trajectory.log_probs.shape
    if config.kl_weight == 0:
        return torch.zeros(num_steps, images, device=rollout.rewards.device), None
    points = points_of(rollout, torch.arange(num_steps)[:, None].expand(-1, images), 1.0, is_frozen=False)
    reference = reference_prediction(policy, points, guidance_scale, batch_size=batch_size)
    if config.estimator == "likelihood":
        at_reference = transition_of(model, reference, points, kernel).log_prob(points.x_s)
        cost = log_ratio_cost(points.log_prob, at_reference)
    else:
        cost = step_cost(model, points.prediction, reference, points, kernel)
    # A step to perfectly clean data adds no noise: it has no KL, and is not trained.
    costs = config.kl_weight * torch.where(cost.isfinite(), cost, 0.0).view(num_steps, images)
    return costs, reference.view(num_steps, images, *reference.shape[1:])


def trained_points(judged: Judged, run: OnlineRun, critic: Critic | None, config: ScoreAsActionConfig) -> Points:
    """The moments that are learnt from, with what the estimator needs to know of each."""
    rollout = judged.rollout
    points = run.points(rollout)
    if judged.references is not None:
        points = replace(points, reference=judged.references[points.step, points.image])
    if config.estimator != "pathwise":
        return with_advantage(points, judged, config, run.processes)
    assert critic is not None
    gradient = value_gradient(
        run.model,
        critic,
        rollout,
        points,
        guidance_scale=run.guidance_scale,
        through_denoiser=config.value.through_denoiser and config.value.sees_x0_hat,
        batch_size=run.batch_size,
    )
    return replace(points, value_gradient=gradient, cost_weight=torch.full_like(points.weight, config.kl_weight))


def with_advantage(points: Points, judged: Judged, config: ScoreAsActionConfig, processes: Processes) -> Points:
    """The points with what they are worth; where that is scaled, what their KL costs is scaled alike."""
    worth, scale = scaled(advantages(judged, config), config, processes)
    row = points.step - judged.first
    return replace(points, advantage=worth[row, points.image], cost_weight=config.kl_weight / scale[row, points.image])


def scaled(
    worth: Float[Tensor, "steps images"], config: ScoreAsActionConfig, processes: Processes
) -> tuple[Float[Tensor, "steps images"], Float[Tensor, "steps images"]]:
    """Advantages in the unit that the settings ask for, and what they were divided by."""
    if config.normalize == "none":
        return worth, torch.ones_like(worth)
    worth = processes.join(worth, dim=1)
    scale = torch.ones_like(worth)
    if config.normalize == "batch":
        scale = scale * (worth.std() + NORMALIZE_EPS)
        worth = worth / scale
    else:
        scale = scale * (worth.std(dim=1, correction=0, keepdim=True) + NORMALIZE_EPS)
        worth = normalize_per_step(worth)
    if config.max_advantage is not None:
        worth = worth.clamp(-config.max_advantage, config.max_advantage)
    return processes.own(worth, dim=1), processes.own(scale, dim=1)


def advantages(judged: Judged, config: ScoreAsActionConfig) -> Float[Tensor, "steps images"]:
    """What each step from the first trained one on is worth, in the unit of the reward."""
    values = _group_values(judged) if config.advantage == "group" else judged.values
    assert values is not None
    if config.advantage == "gae":
        return gae(values, judged.costs, trace=config.trace)
    if config.advantage == "value_difference":
        return value_difference(values, judged.costs)
    return return_minus_value(values, judged.costs)


def _group_values(judged: Judged) -> Tensor:
    """The mean reward of the other images of each image's prompt as V at every node, and its own reward at the last."""
    rollout = judged.rollout
    others = required_others_mean(rollout.rewards, rollout.group)
    return torch.cat([others.expand(len(judged.costs), -1), rollout.rewards[None]])
