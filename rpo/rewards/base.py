"""What a reward is, how one is asked so that a wrong answer stops the run, and how several are weighted.

A reward sees images and prompts and gives one number per image, higher is better. It is often somebody else's model, so
`score` believes nothing: images, prompts and answer are checked, and the error names the reward, the image and its
prompt and says where both are saved.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch

from rpo.errors import InputError
from rpo.rewards.checks import RewardError, check_batch, check_finite, check_range, per_sample
from rpo.rewards.evidence import save_evidence
from rpo.types import Images, PerSample

__all__ = ["Reward", "RewardError", "WeightedRewards", "score"]


class Reward(Protocol):
    """Anything that judges images by their prompts."""

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """One number per image, higher is better.

        Args:
            images: RGB in [0, 1].
            prompts: One per image.
        """
        ...


@torch.no_grad()
def score(
    reward: Reward, images: Images, prompts: Sequence[str], *, name: str, evidence: Path | None = None
) -> PerSample:
    """Ask a reward, and check the question and the answer.

    The reward gets copies, so that it cannot change what the next one sees, and no gradient is kept. It is asked once:
    after an exception that does not say more, the whole batch is at fault.

    Args:
        reward: What to ask. It may answer with a tensor on any device, an array, or a list of numbers.
        evidence: A folder for the images and prompts of an error; each error makes a new folder in it.

    Returns:
        One finite float32 per image, on the device of the images.

    Example:
        >>> score(lambda images, prompts: images.mean((1, 2, 3)), torch.ones(2, 3, 8, 8), ["a", "b"], name="light")
        tensor([1., 1.])
    """
    try:
        check_batch(images, prompts)
    except RewardError as error:
        raise RewardError(f"reward {name!r}: {error}") from error
    try:
        check_range(images)
        values = per_sample(reward(images.detach().clone(), list(prompts)), len(images))
        check_finite(values)
    except Exception as error:  # whatever somebody else's model raises
        raise _traced(error, images, prompts, name=name, evidence=evidence) from error
    return values.float().to(images.device)


class WeightedRewards:
    """Several rewards and their weighted sum, which is itself a reward.

    Example:
        >>> both = WeightedRewards({"light": (lambda images, _: images.mean((1, 2, 3)), 2.0)})
        >>> both(torch.ones(1, 3, 8, 8), ["a red circle"])
        tensor([2.])
    """

    def __init__(self, rewards: Mapping[str, tuple[Reward, float]]) -> None:
        """Take rewards by the names that messages and logs call them, each with its weight.

        Args:
            rewards: At least one. A negative weight turns a reward into a penalty.
        """
        if not rewards:
            raise InputError("got no reward; expected at least one; name one with its weight, such as shapes: 1.0")
        for name, (_, weight) in rewards.items():
            if not math.isfinite(weight) or weight == 0:
                raise InputError(
                    f"the weight of reward {name!r} is {weight:g}; expected a finite number other than 0; leave out a "
                    "reward that should not count"
                )
        self._rewards = {name: reward for name, (reward, _) in rewards.items()}
        self.weights: Mapping[str, float] = MappingProxyType({name: weight for name, (_, weight) in rewards.items()})

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """The weighted sum of all rewards, one number per image."""
        return self.weighted_sum(self.parts(images, prompts))

    def with_gradient(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """The weighted sum with the gradient that the rewards give it: asked as they are, unchecked."""
        return self.weighted_sum({name: reward(images, prompts) for name, reward in self._rewards.items()})

    def parts(self, images: Images, prompts: Sequence[str], *, evidence: Path | None = None) -> dict[str, PerSample]:
        """Every reward's own scores, unweighted.

        Args:
            evidence: A folder for the images and prompts of an error.
        """
        return {
            name: score(reward, images, prompts, name=name, evidence=evidence) for name, reward in self._rewards.items()
        }

    def weighted_sum(self, parts: Mapping[str, PerSample]) -> PerSample:
        """The sum of what `parts` gave, or of what was made of it, each times its reward's weight."""
        return torch.stack([weight * parts[name] for name, weight in self.weights.items()]).sum(0)


def _traced(
    error: Exception, images: Images, prompts: Sequence[str], *, name: str, evidence: Path | None
) -> RewardError:
    """The error with its reward, image and prompt named, after these are saved."""
    indices = list(range(len(images)))
    if not isinstance(error, RewardError):
        problem = (
            f"raised {type(error).__name__}: {error}; expected one number per image; call the reward on these images "
            "to find the fault, then resume"
        )
    else:
        problem = str(error)
        if error.indices and error.batch_size == len(images):  # else it counts in a batch that the reward made itself
            indices = list(error.indices)
    more = f" and {len(indices) - 1} more" if len(indices) > 1 else ""
    message = f"reward {name!r}, image {indices[0]} ({prompts[indices[0]]!r}){more}: {problem}"
    folder = None
    if evidence is not None:
        try:
            folder = save_evidence(evidence, images, prompts, name=name, indices=indices, problem=problem)
            message += f". Images and prompts are in {folder}"
        except OSError as failure:  # a full disk must not hide what happened
            message += f". Images and prompts could not be saved: {failure}"
    return RewardError(message, indices=indices, batch_size=len(images), saved_in=folder)
