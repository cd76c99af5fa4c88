"""What every step of a rollout is worth: its cost against the reference, V along the path, and the advantage.

The costs are kept for all steps, trained or not: what a step is worth includes the costs it leads to.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rpo.models.base import DiffusionModel
from rpo.objectives.advantages import gae, normalize_per_step, return_minus_value, value_difference
from rpo.objectives.score_as_action import log_ratio_cost
from rpo.rewards.base import WeightedRewards
from rpo.trainers.moments import reference_prediction, step_cost, transition_of, value_nodes
from rpo.trainers.points import points_of
from rpo.trainers.policy import Policy
from rpo.trainers.rollouts import Rollout
from rpo.trainers.score_as_action_config import ScoreAsActionConfig, ValueConfig
from rpo.trainers.value import Critic
from rpo.trainers.value_network import ValueNetwork
from rpo.types import Latents, PerSample


@dataclass(frozen=True)
class Judged:
    """A rollout with everything that its steps are worth."""

    rollout: Rollout
    costs: Float[Tensor, "steps images"]
    """Of every step, times `kl_weight`; zeros without a reference."""
    values: Float[Tensor, "nodes images"] | None
    """V at every node; the reward at the last."""
    references: Float[Tensor, "steps images c h w"] | None
    """Guided output of the reference at every step."""


def make_critic(
    model: DiffusionModel,
    rewards: WeightedRewards,
    config: ValueConfig,
    network: nn.Module | None,
    *,
    seed: int,
) -> Critic:
    """V for a model and its rewards.

    Args:
        model: Whose rollouts are judged.
        rewards: Asked about the predicted clean image, if the design has a place for that.
        config: The settings.
        network: F; the package's own by default.
        seed: Of its first weights and the order of its data.
    """
    if network is None:
        prompt_dim = model.encode_prompts(["a"]).prompt_embeds.shape[-1]
        network = ValueNetwork(
            model.latent_shape, prompt_dim, inputs=config.inputs, channels=config.channels, seed=seed
        ).to(model.device)

    def terminal(latents: Latents, prompts: Sequence[str]) -> PerSample:
        return rewards(model.decode(latents), prompts)

    return Critic(
        network,
        design=config.design,
        terminal=None if config.design == "none" else terminal,
        branch=config.branch,
        learning_rate=config.learning_rate,
        seed=seed,
    )


def judge(
    rollout: Rollout,
    policy: Policy,
    critic: Critic | None,
    config: ScoreAsActionConfig,
    guidance_scale: float,
    batch_size: int,
) -> Judged:
    """What every step of a rollout costs, and V at every node.

    Args:
        rollout: With its predictions.
        policy: What drew it.
        critic: V, where it is used.
        config: The settings.
        guidance_scale: Of the reference's prediction.
        batch_size: Latents at once.
    """
    model, kernel = policy.model, config.rollout_kernel
    steps, images = rollout.trajectory.log_probs.shape
    costs, references = torch.zeros(steps, images, device=rollout.rewards.device), None
    if config.kl_weight > 0:
        every = torch.arange(steps)[:, None].expand(-1, images)
        points = points_of(rollout, every, float(steps), is_frozen=False)
        reference = reference_prediction(policy, points, guidance_scale, batch_size=batch_size)
        if config.estimator == "likelihood":
            at_reference = transition_of(model, reference, points, kernel).log_prob(points.x_s)
            cost = log_ratio_cost(points.log_prob, at_reference)
        else:
            cost = step_cost(model, points.prediction, reference, points, kernel)
        # A step to perfectly clean data adds no noise: it has no KL, and is not trained.
        costs = config.kl_weight * torch.where(cost.isfinite(), cost, 0.0).view(steps, images)
        references = reference.view(steps, images, *reference.shape[1:])
    values = None
    if critic is not None:
        values = critic.evaluate(value_nodes(model, rollout), batch_size=batch_size).view(steps + 1, images)
        values = torch.cat([values[:-1], rollout.rewards[None]])
    return Judged(rollout, costs, values, references)


def advantages(judged: Judged, config: ScoreAsActionConfig) -> Float[Tensor, "steps images"]:
    """What each step of each image is worth, scaled as the settings say."""
    values = judged.values
    if config.advantage == "group":
        values = _group_means(judged.rollout)
    assert values is not None
    if config.advantage == "gae":
        worth = gae(values, judged.costs, trace=config.trace)
    elif config.advantage == "value_difference":
        worth = value_difference(values, judged.costs)
    else:
        worth = return_minus_value(values, judged.costs)
    if config.normalize == "per_step":
        worth = normalize_per_step(worth)
    elif config.normalize == "batch":
        worth = worth / (worth.std() + 1e-8)
    if config.normalize != "none" and config.max_advantage is not None:
        worth = worth.clamp(-config.max_advantage, config.max_advantage)
    return worth


def _group_means(rollout: Rollout) -> Tensor:
    """The mean reward of each image's prompt as V at every node, and its own reward at the last."""
    rewards, group = rollout.rewards, rollout.group
    sums = rewards.new_zeros(int(group.max()) + 1).index_add(0, group, rewards)
    means = (sums / group.bincount())[group]
    return torch.cat([means.expand(rollout.trajectory.grid.num_steps, -1), rewards[None]])
