"""What a reward is, how one is asked so that a wrong answer stops the run, and how several are weighted.

A reward sees images and prompts and gives one number per image, higher is better. It is often somebody else's model, so
`score` believes nothing: images, prompts and answer are checked, and the error names the reward, the image and its
prompt and says where both are saved. NaN is how a reward says that it could not judge an image: an error here, too,
unless who asks can do without some of the answers.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from rpo.data.pixels import to_pixels
from rpo.data.preference import encode_png
from rpo.data.prompts import metadata_of
from rpo.errors import InputError
from rpo.files.text import write_text
from rpo.rewards.answers import Answered, RewardError, answered, joined, scores_and_info
from rpo.rewards.function import FunctionReward
from rpo.rewards.version import version_of
from rpo.types import Images, PerSample

MAX_IMAGES = 8
"""Images kept of one fault; a reward that fails on a whole batch fails alike on all of it."""


class Reward(Protocol):
    """Anything that judges images by their prompts."""

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """One number per image, higher is better; images are RGB in [0, 1], with a prompt each."""
        ...


@runtime_checkable
class CanLeave(Protocol):
    """A reward whose model lives where the images are, and need not stay there."""

    def leave(self) -> None:
        """Go to the main memory until the next question."""
        ...


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
    return ask(reward, images, prompts, name=name, evidence=evidence).values


@torch.no_grad()
def ask(
    reward: Reward,
    images: Images,
    prompts: Sequence[str],
    *,
    name: str,
    evidence: Path | None = None,
    may_fail: bool = False,
) -> Answered:
    """The same with what the reward says beside its scores.

    Args:
        may_fail: Whether a score may be NaN.
    """
    try:
        check_batch(images, prompts)
    except RewardError as error:
        raise RewardError(f"reward {name!r}: {error}") from error
    try:
        check_range(images)
        said = _answer(reward, images.detach().clone(), list(prompts))
        check_finite(said.values, may_fail=may_fail, failures=said.failures)
    except Exception as error:  # whatever somebody else's model raises
        raise traced(error, images, prompts, name=name, evidence=evidence) from error
    return replace(said, values=said.values.float().to(images.device))


def _answer(reward: Reward, images: Images, prompts: list[str]) -> Answered:
    if isinstance(reward, FunctionReward):
        return reward.answer(images, prompts)
    return answered(*scores_and_info(reward(images, prompts)), len(images))


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
        self.each: Mapping[str, Reward] = MappingProxyType({name: reward for name, (reward, _) in rewards.items()})
        self.weights: Mapping[str, float] = MappingProxyType({name: weight for name, (_, weight) in rewards.items()})

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """The weighted sum of all rewards, one number per image."""
        return self.weighted_sum(self.parts(images, prompts))

    def with_gradient(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """The weighted sum with the gradient that the rewards give it, some of which may give none."""
        return self.weighted_sum(self.parts_with_gradient(images, prompts))

    def parts_with_gradient(self, images: Images, prompts: Sequence[str]) -> dict[str, PerSample]:
        """Every reward's own scores, unweighted, with the gradient that it gives them; no number is checked."""
        every = {
            name: one if isinstance(one, FunctionReward) else FunctionReward(one) for name, one in self.each.items()
        }
        return {name: one(images, prompts) for name, one in every.items()}

    def parts(self, images: Images, prompts: Sequence[str], *, evidence: Path | None = None) -> dict[str, PerSample]:
        """Every reward's own scores, unweighted.

        The images and prompts of an error go into a new folder in `evidence`.
        """
        return {name: one.values for name, one in self.ask(images, prompts, evidence=evidence).items()}

    def ask(
        self,
        images: Images,
        prompts: Sequence[str],
        *,
        evidence: Path | None = None,
        may_fail: bool = False,
        batch_size: int | None = None,
    ) -> dict[str, Answered]:
        """The same with what every reward says beside its scores.

        Args:
            may_fail: Whether a score may be NaN.
            batch_size: Images that a reward is asked about at once; nothing means all of them.
        """
        size = batch_size or max(len(images), 1)
        starts = range(0, max(len(images), 1), size)
        return {
            name: joined(
                [
                    ask(
                        reward,
                        images[start : start + size],
                        prompts[start : start + size],
                        name=name,
                        evidence=evidence,
                        may_fail=may_fail,
                    )
                    for start in starts
                ]
            )
            for name, reward in self.each.items()
        }

    def version(self) -> str:
        """The versions of all, with their weights."""
        return " + ".join(f"{self.weights[name]:g} {name} {version_of(one)}" for name, one in self.each.items())

    def leave(self) -> None:
        """Have the reward models that can go to the main memory; they come back when they are asked."""
        for reward in self.each.values():
            inner = reward.function if isinstance(reward, FunctionReward) else reward
            if isinstance(inner, CanLeave):
                inner.leave()

    def weighted_sum(self, parts: Mapping[str, PerSample]) -> PerSample:
        """The sum of what `parts` gave, or of what was made of it, each times its reward's weight."""
        return torch.stack([weight * parts[name] for name, weight in self.weights.items()]).sum(0)


def check_batch(images: Images, prompts: Sequence[str]) -> None:
    """Refuse what is no batch of RGB images with one prompt each."""
    if not images.is_floating_point() or images.shape[1:2] != (3,) or images.ndim != 4 or not images.numel():  # noqa: PLR2004
        raise RewardError(
            f"got images of {images.dtype} {list(images.shape)}; expected float [batch, 3, height, width] and at least "
            "one image; give RGB, channels first"
        )
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise RewardError(f"got the prompts {prompts!r}; expected a list of strings; give one string per image")
    if len(prompts) != len(images):
        raise RewardError(f"got {len(prompts)} prompts for {len(images)} images; expected one per image; repeat them")


def check_range(images: Images) -> None:
    """Refuse images outside [0, 1]; reads them, so it costs one device synchronisation."""
    low, high = torch.stack(torch.aminmax(images.detach().flatten(1), dim=1)).float().tolist()
    outside = [index for index in range(len(images)) if not (low[index] >= 0 and high[index] <= 1)]
    if outside:
        first = outside[0]
        span = f"got values from {low[first]:.9g} to {high[first]:.9g}"
        remedy = "expected [0, 1]; divide bytes by 255, or undo 2x - 1"
        raise RewardError(f"{span}; {remedy}", indices=outside, batch_size=len(images))


def check_finite(values: Tensor, *, may_fail: bool = False, failures: Mapping[int, str] | None = None) -> None:
    """Refuse scores that are no finite float32; NaN only where none may fail.

    Args:
        failures: Why some are NaN, by their place.
    """
    wrong = (~(values.float().isfinite() | (values.isnan() & may_fail))).nonzero().flatten().tolist()
    if wrong:
        why = (failures or {}).get(wrong[0])
        given = f"returned {values[wrong[0]].item():g}" + (f" ({why})" if why else "")
        remedy = "expected a finite float32 number; make the reward finite on every image, then resume"
        raise RewardError(f"{given}; {remedy}", indices=wrong, batch_size=len(values))


def traced(
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


def save_evidence(
    parent: Path, images: Images, prompts: Sequence[str], *, name: str, indices: Sequence[int], problem: str
) -> Path:
    """Write the images at fault as PNG, and in `fault.json` their prompts and what was wrong, into a new folder."""
    folder = _new_folder(parent, _folder_name(name))
    kept: list[dict[str, Any]] = []
    for index in indices[:MAX_IMAGES]:
        file = f"image_{index:03d}.png"
        (pixels,) = to_pixels(images[index : index + 1].detach().float().nan_to_num(0))
        (folder / file).write_bytes(encode_png(pixels))
        known = metadata_of(prompts[index])
        kept.append({"index": index, "prompt": prompts[index], **({"metadata": known} if known else {}), "file": file})
    record = {"reward": name, "problem": problem, "images_at_fault": len(indices), "images": kept}
    write_text(folder / "fault.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return folder


def has_evidence(parent: Path, name: str) -> bool:
    """Whether images of a fault of this reward were kept already."""
    return (parent / f"{_folder_name(name)}-1").exists()


def _folder_name(reward: str) -> str:
    return re.sub(r"[^\w.-]+", "_", reward).strip(".") or "reward"


def _new_folder(parent: Path, name: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while (folder := parent / f"{name}-{number}").exists():
        number += 1
    try:
        folder.mkdir()  # several processes may fail at once; only one of them makes this folder
    except FileExistsError:
        return _new_folder(parent, name)
    return folder
