"""How images compare with those of their prompt, by each reward apart, over all processes."""

from collections.abc import Mapping

import torch

from rpo.objectives.advantages import Scale, group_normalize
from rpo.objectives.endpoint.update import Ranked
from rpo.trainers.rollouts.draw import Rollout
from rpo.training.processes import Processes
from rpo.types import PerSample


def compared_in_groups(
    rollout: Rollout, reward: str, processes: Processes, *, images_per_prompt: int, scale: Scale
) -> PerSample:
    """The images of this process, by one of the rewards: relative to the mean of their prompt.

    Args:
        images_per_prompt: Size of a group, of which a rollout is a number, beside each other.
    """
    rewards = processes.join(rollout.parts[reward])
    group = torch.arange(len(rewards), device=rewards.device) // images_per_prompt
    return processes.own(group_normalize(rewards, group, scale=scale))


def ranked_in_groups(
    rollout: Rollout, weights: Mapping[str, float], processes: Processes, images_per_prompt: int, ranked: Ranked
) -> PerSample:
    """The images of this process, by all rewards: each is ranked by itself before they are weighted.

    Args:
        weights: Of the rewards, by name.
        images_per_prompt: Size of a group.
    """
    total = torch.zeros_like(rollout.rewards)
    for name, weight in weights.items():
        one = compared_in_groups(rollout, name, processes, images_per_prompt=images_per_prompt, scale=ranked.scale)
        total = total + weight * ranked(one)
    return total / sum(map(abs, weights.values()))
