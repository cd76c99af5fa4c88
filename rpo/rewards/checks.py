"""What makes a question to a reward, and its answer, sound; what is not sound is a `RewardError`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rpo.errors import InputError
from rpo.types import Images

IMAGE_DIMS, RGB = 4, 3

_REAL_KINDS = "fiub"
"""numpy's letters for floats, integers, unsigned integers and booleans."""


class RewardError(InputError):
    """A batch cannot be scored. A reward that knows which of its images is at fault raises it with their indices."""

    def __init__(
        self, message: str, *, indices: Sequence[int] = (), batch_size: int = 0, saved_in: Path | None = None
    ) -> None:
        """Say what is wrong, and with which images.

        Args:
            indices: The images at fault, in order; none means the whole batch.
        """
        super().__init__(message)
        self.indices, self.batch_size, self.saved_in = tuple(indices), batch_size, saved_in


def check_batch(images: Images, prompts: Sequence[str]) -> None:
    """Refuse what is no batch of RGB images with one prompt each."""
    if not images.is_floating_point() or images.ndim != IMAGE_DIMS or images.shape[1] != RGB or not images.numel():
        raise RewardError(
            f"got images of {images.dtype} {list(images.shape)}; expected float [batch, 3, height, width] and at least "
            "one image; give RGB, channels first"
        )
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise RewardError(f"got the prompts {prompts!r}; expected a list of strings; give one string per image")
    if len(prompts) != len(images):
        raise RewardError(
            f"got {len(prompts)} prompts for {len(images)} images; expected one per image; repeat each prompt once per "
            "image"
        )


def check_range(images: Images) -> None:
    """Refuse images outside [0, 1]; reads them, so it costs one device synchronisation."""
    low, high = torch.stack(torch.aminmax(images.detach().flatten(1), dim=1)).float().tolist()
    outside = [index for index in range(len(images)) if not (low[index] >= 0 and high[index] <= 1)]
    if outside:
        first = outside[0]
        raise RewardError(
            f"got values from {low[first]:.9g} to {high[first]:.9g}; expected [0, 1]; divide bytes by 255, or undo "
            "2x - 1",
            indices=outside,
            batch_size=len(images),
        )


def check_finite(values: Tensor) -> None:
    """Refuse scores that are no finite float32."""
    wrong = (~values.float().isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise RewardError(
            f"returned {values[wrong[0]].item():g}; expected a finite float32 number; make the reward finite on every "
            "image, then resume",
            indices=wrong,
            batch_size=len(values),
        )


def per_sample(answer: Tensor | NDArray[np.generic] | Sequence[float], batch_size: int) -> Tensor:
    """Read an answer as one number per image, in float64 on the CPU; whether they are finite is not asked.

    Args:
        answer: A tensor or an array of one dimension, or a list of numbers.
    """
    values = _to_tensor(answer)
    if values.shape != (batch_size,):
        given = f"{len(values)} numbers" if values.ndim == 1 else f"numbers of shape {list(values.shape)}"
        raise RewardError(
            f"returned {given} for {batch_size} images; expected shape [{batch_size}], one number per image in their "
            "order; squeeze extra dimensions, and do not average over the batch"
        )
    return values


def _to_tensor(answer: object) -> Tensor:
    if isinstance(answer, Tensor) and not answer.is_complex():
        return answer.detach().cpu().double()
    if isinstance(answer, np.ndarray) and answer.dtype.kind in _REAL_KINDS:
        return torch.from_numpy(answer.astype(np.float64))
    if isinstance(answer, list | tuple):
        return torch.tensor([_to_float(item, index) for index, item in enumerate(answer)], dtype=torch.float64)
    kind = f" of {answer.dtype}" if isinstance(answer, Tensor | np.ndarray) else ""
    raise RewardError(
        f"returned a {type(answer).__name__}{kind}; expected one real number per image; return them as a tensor, an "
        "array or a list"
    )


def _to_float(item: object, index: int) -> float:
    number = item.item() if isinstance(item, Tensor | np.ndarray | np.generic) and item.ndim == 0 else item
    if isinstance(number, int | float):
        return float(number)
    raise RewardError(
        f"returned a list with a {type(item).__name__} at position {index}; expected numbers only; return one number "
        "per image"
    )
