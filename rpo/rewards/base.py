"""What a reward is, how one is asked so that a wrong answer stops the run, and how several are weighted.

A reward sees images and prompts and gives one number per image, higher is better. It is often somebody else's model, so
`score` believes nothing: images, prompts and answer are checked, and the error names the reward, the image and its
prompt and says where both are saved.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rpo.data.pixels import to_pixels
from rpo.data.preference import encode_png
from rpo.errors import InputError
from rpo.files.text import write_text
from rpo.types import Images, PerSample

Answer = Tensor | NDArray[np.generic] | Sequence[float]
"""What a reward may answer with: a tensor or an array of one dimension, or a list of numbers."""

MAX_IMAGES = 8
"""Images kept of one fault; a reward that fails on a whole batch fails alike on all of it."""

_REAL_KINDS = "fiub"
"""numpy's letters for floats, integers, unsigned integers and booleans."""


class Reward(Protocol):
    """Anything that judges images by their prompts."""

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """One number per image, higher is better; images are RGB in [0, 1], with a prompt each."""
        ...


class RewardError(InputError):
    """A batch cannot be scored. A reward that knows which of its images is at fault raises it with their indices."""

    def __init__(
        self, message: str, *, indices: Sequence[int] = (), batch_size: int = 0, saved_in: Path | None = None
    ) -> None:
        """Say what is wrong, and with which images; no indices means the whole batch."""
        super().__init__(message)
        self.indices, self.batch_size, self.saved_in = tuple(indices), batch_size, saved_in


@dataclass(frozen=True)
class FunctionReward:
    """What `function` says of the images and prompts, as one number per image on the images' device.

    Example:
        >>> import torch
        >>> longest_prompt_wins = FunctionReward(lambda images, prompts: [len(prompt) for prompt in prompts])
        >>> longest_prompt_wins(torch.zeros(2, 3, 8, 8), ["a cat", "a large cat"])
        tensor([ 5., 11.])
    """

    function: Callable[[Images, Sequence[str]], Answer]
    """Takes images [batch, 3, height, width] in [0, 1] and one prompt per image; higher is better."""

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Call the function; a gradient that its answer has is kept."""
        answer = self.function(images, prompts)
        values = per_sample(answer, len(images)).float().to(images.device)
        return answer.float().to(images.device) if isinstance(answer, Tensor) and answer.requires_grad else values


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
        """The weighted sum with the gradient that the rewards give it; no number is checked."""
        return self.weighted_sum({name: FunctionReward(one)(images, prompts) for name, one in self._rewards.items()})

    def parts(self, images: Images, prompts: Sequence[str], *, evidence: Path | None = None) -> dict[str, PerSample]:
        """Every reward's own scores, unweighted.

        The images and prompts of an error go into a new folder in `evidence`.
        """
        return {
            name: score(reward, images, prompts, name=name, evidence=evidence) for name, reward in self._rewards.items()
        }

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


def check_finite(values: Tensor) -> None:
    """Refuse scores that are no finite float32."""
    wrong = (~values.float().isfinite()).nonzero().flatten().tolist()
    if wrong:
        given = f"returned {values[wrong[0]].item():g}"
        remedy = "expected a finite float32 number; make the reward finite on every image, then resume"
        raise RewardError(f"{given}; {remedy}", indices=wrong, batch_size=len(values))


def per_sample(answer: Answer, batch_size: int) -> Tensor:
    """Read an answer as one number per image, in float64 on the CPU; whether they are finite is not asked."""
    if isinstance(answer, Tensor) and not answer.is_complex():
        values = answer.detach().cpu().double()
    elif isinstance(answer, np.ndarray) and answer.dtype.kind in _REAL_KINDS:
        values = torch.from_numpy(answer.astype(np.float64))
    elif isinstance(answer, list | tuple):
        values = torch.tensor([_to_float(item, index) for index, item in enumerate(answer)], dtype=torch.float64)
    else:
        kind = f" of {answer.dtype}" if isinstance(answer, Tensor | np.ndarray) else ""
        raise RewardError(
            f"returned a {type(answer).__name__}{kind}; expected one real number per image; return them as a tensor, "
            "an array or a list"
        )
    if values.shape != (batch_size,):
        given = f"{len(values)} numbers" if values.ndim == 1 else f"numbers of shape {list(values.shape)}"
        raise RewardError(
            f"returned {given} for {batch_size} images; expected shape [{batch_size}], one number per image in their "
            "order; squeeze extra dimensions, and do not average over the batch"
        )
    return values


def _to_float(item: object, index: int) -> float:
    number = item.item() if isinstance(item, Tensor | np.ndarray | np.generic) and item.ndim == 0 else item
    if isinstance(number, int | float):
        return float(number)
    raise RewardError(f"returned a list with a {type(item).__name__} at position {index}; expected numbers only")


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


def save_evidence(
    parent: Path, images: Images, prompts: Sequence[str], *, name: str, indices: Sequence[int], problem: str
) -> Path:
    """Write the images at fault as PNG, and in `fault.json` their prompts and what was wrong, into a new folder."""
    folder = _new_folder(parent, re.sub(r"[^\w.-]+", "_", name).strip(".") or "reward")
    kept: list[dict[str, int | str]] = []
    for index in indices[:MAX_IMAGES]:
        file = f"image_{index:03d}.png"
        (pixels,) = to_pixels(images[index : index + 1].detach().float().nan_to_num(0))
        (folder / file).write_bytes(encode_png(pixels))
        kept.append({"index": index, "prompt": prompts[index], "file": file})
    record = {"reward": name, "problem": problem, "images_at_fault": len(indices), "images": kept}
    write_text(folder / "fault.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return folder


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
