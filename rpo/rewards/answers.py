"""What a reward answers, read as one real number per image, with what it may say beside them.

A pair whose second part is a mapping is (scores, info), as TRL's and ddpo-pytorch's rewards answer: no score is a
mapping, so that nothing else can be meant. Of info, what has one number per image is logged.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rpo.errors import InputError
from rpo.types import PerSample

Answer = Tensor | NDArray[np.generic] | Sequence[float]
"""What a reward may answer with: a tensor or an array of one dimension, or a list of numbers."""

_REAL_KINDS = "fiub"
"""numpy's letters for floats, integers, unsigned integers and booleans."""

_PAIR = 2

FAILURE = "failure"
"""The name in info of a list that says, for each image, why it has no score; None where it has one."""


class RewardError(InputError):
    """A batch cannot be scored. A reward that knows which of its images is at fault raises it with their indices."""

    def __init__(
        self, message: str, *, indices: Sequence[int] = (), batch_size: int = 0, saved_in: Path | None = None
    ) -> None:
        """Say what is wrong, and with which images; no indices means the whole batch."""
        super().__init__(message)
        self.indices, self.batch_size, self.saved_in = tuple(indices), batch_size, saved_in


@dataclass(frozen=True)
class Answered:
    """What a reward says of a batch."""

    values: PerSample
    """One number per image; NaN says that it could not be judged, where that is no error."""
    info: Mapping[str, float] = field(default_factory=dict[str, float])
    """The mean over the judged images of what else it says in numbers, by name."""
    failures: Mapping[int, str] = field(default_factory=dict[int, str])
    """Why an image has no score, by its place in the batch, where the reward says so."""


def scores_and_info(answer: Any, *, has_info: bool = False) -> tuple[Any, Mapping[str, Any]]:
    """The two parts of an answer; info that is no mapping is left out.

    Args:
        has_info: Whether it was declared to be a pair.
    """
    if isinstance(answer, tuple) and len(answer) == _PAIR and (has_info or isinstance(answer[1], Mapping)):
        return answer[0], answer[1] if isinstance(answer[1], Mapping) else {}
    if has_info:
        raise RewardError(
            f'returned a {type(answer).__name__}, but was adapted with returns="scores_and_info"; expected a pair of '
            "these; return both, or leave `returns` out"
        )
    return answer, {}


def answered(scores: Any, info: Mapping[str, Any], batch_size: int) -> Answered:
    """What a reward said, read."""
    values, whys = per_sample(scores, batch_size), info.get(FAILURE)
    told = whys if isinstance(whys, list | tuple) and len(whys) == batch_size else ()
    failures = {row: why for row, why in enumerate(told) if isinstance(why, str) and values[row].isnan()}
    return Answered(values, means_of({name: one for name, one in info.items() if name != FAILURE}, values), failures)


def joined(parts: Sequence[Answered]) -> Answered:
    """What was said of one part of a batch after the other."""
    if len(parts) == 1:
        return parts[0]
    starts = [sum(len(one.values) for one in parts[:number]) for number in range(len(parts))]
    judged = [float((~one.values.isnan()).sum()) for one in parts]
    told = [one.info for one in parts]
    info = dict[str, float]()
    for name in dict.fromkeys(name for one in told for name in one):
        pairs = [(one[name], count) for one, count in zip(told, judged, strict=True) if name in one and count]
        info[name] = sum(mean * count for mean, count in pairs) / (sum(count for _, count in pairs) or math.nan)
    failures = {start + row: why for start, one in zip(starts, parts, strict=True) for row, why in one.failures.items()}
    return Answered(torch.cat([one.values for one in parts]), info, failures)


def means_of(info: Mapping[str, Any], scores: Tensor) -> dict[str, float]:
    """The means over the images with a score of what has one real number for each; text and the like are left out."""
    found, is_judged = dict[str, float](), ~scores.isnan()
    for name, value in info.items():
        try:
            found[str(name)] = per_sample(value, len(scores))[is_judged].mean().item()
        except (RewardError, TypeError, ValueError):
            continue
    return found


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
    raise RewardError(
        f"returned a list with a {type(item).__name__} at position {index}; expected numbers only; a pair of scores "
        'and something else is declared by rpo.rewards.adapt(…, returns="scores_and_info")'
    )
