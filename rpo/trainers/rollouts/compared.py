"""How images compare with those of their prompt, by each reward apart, over all processes."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rpo.objectives.advantages import Scale, group_normalize, shares
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
    rewards = processes.join(rollout.counted[reward])
    group = torch.arange(len(rewards), device=rewards.device) // images_per_prompt
    return processes.own(group_normalize(rewards, group, scale=scale))


def ranked_in_groups(
    rollout: Rollout, weights: Mapping[str, float], processes: Processes, images_per_prompt: int, ranked: Ranked
) -> dict[str, PerSample]:
    """The images of this process, by each reward: ranked by itself and weighted; what they are worth is the sum.

    Args:
        weights: Of the rewards, by name.
        images_per_prompt: Size of a group.
    """
    found, size = dict[str, PerSample](), sum(map(abs, weights.values()))
    for name, weight in weights.items():
        one = compared_in_groups(rollout, name, processes, images_per_prompt=images_per_prompt, scale=ranked.scale)
        found[name] = weight * ranked(one) / size
    return found


def raw_in_groups(
    rollout: Rollout, weights: Mapping[str, float], processes: Processes, *, images_per_prompt: int
) -> dict[str, PerSample]:
    """The same where raw scores are summed: how the weighted score of each differs from the mean of the prompt.

    Where there is one image of each prompt, from that of the rollout.
    """
    size = images_per_prompt if images_per_prompt > 1 else rollout.num_images * processes.count
    if size == 1:
        return {}  # compared with nothing
    return {
        name: weight * compared_in_groups(rollout, name, processes, images_per_prompt=size, scale="none")
        for name, weight in weights.items()
    }


def share_facts(weighted: Mapping[str, PerSample], processes: Processes) -> dict[str, Tensor]:
    """What part each of several rewards has in what images are worth, over all processes."""
    if len(weighted) < 2:  # noqa: PLR2004 - one has all of it
        return {}
    every = torch.stack([processes.join(one) for one in weighted.values()])
    return {f"reward/{name}/share": share for name, share in zip(weighted, shares(every), strict=True)}
