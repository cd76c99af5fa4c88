"""A reward that others ask for: one question at a time, and what it raises is a failure of the images that it names.

A reward that names no image failed on all that it was asked about, with the same reason. Where it names some, the
others are asked about once more, without these.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch

from rpo.rewards.answers import RewardError
from rpo.rewards.base import Reward, ask
from rpo.rewards.differentiable import is_differentiable
from rpo.rewards.ranges import RANGES
from rpo.rewards.remote.form import Pixels, Said
from rpo.rewards.version import version_of

LONGEST_REASON = 2000
"""Characters of why an image has no score."""


@final
class Served:
    """One reward of a server, and how often it was asked.

    Attributes:
        lock: Held while it is asked: a reward serves one thread at a time.
        asked: Images.
        failed: Those of them without a score.
    """

    def __init__(self, name: str, reward: Reward, *, device: torch.device, batch_size: int) -> None:
        """Take a reward.

        Args:
            device: Where it gets its images.
            batch_size: Images that it is asked about at once.
        """
        self.name, self.reward, self._device, self._size = name, reward, device, batch_size
        self.lock = threading.Lock()
        self.asked = self.failed = 0

    @property
    def details(self) -> dict[str, Any]:
        """What there is to know of it."""
        usual = RANGES.get(self.name.partition(":")[0])
        return {
            "is_differentiable": is_differentiable(self.reward),
            "range": list(usual) if usual else None,
        }

    def version(self) -> str:
        """What to hold its scores against; it loads the weights, so it waits for `lock`."""
        with self.lock:
            return version_of(self.reward)

    def judge(self, images: Sequence[Pixels], prompts: Sequence[str]) -> Said:
        """What the images are worth, or why that cannot be said; with `lock` held."""
        found = _Judged([None] * len(images), [None] * len(images), [])
        by_size = dict[tuple[int, ...], list[int]]()
        for row, one in enumerate(images):
            by_size.setdefault(one.shape, []).append(row)
        for rows in by_size.values():
            for start in range(0, len(rows), self._size):
                self._judge(images, prompts, rows[start : start + self._size], found)
        self.asked += len(images)
        self.failed += sum(score is None for score in found.scores)
        return Said(scores=found.scores, failures=found.failures, info=_means(found.info))

    def _judge(self, images: Sequence[Pixels], prompts: Sequence[str], rows: list[int], found: "_Judged") -> None:
        while rows:
            pixels = torch.from_numpy(np.stack([images[row] for row in rows])).to(self._device)
            batch, texts = pixels.permute(0, 3, 1, 2).contiguous().float() / 255, [prompts[row] for row in rows]
            try:
                answered = ask(self.reward, batch, texts, name=self.name, may_fail=True)
            except RewardError as error:
                faulty = [rows[index] for index in error.indices] or rows
                for row in faulty:
                    found.failures[row] = str(error)[:LONGEST_REASON]
                rows = [row for row in rows if row not in faulty]
                continue
            values = answered.values.tolist()
            for index, (row, score) in enumerate(zip(rows, values, strict=True)):
                is_judged = score == score  # noqa: PLR0124 - NaN alone differs from itself
                found.scores[row] = score if is_judged else None
                found.failures[row] = None if is_judged else answered.failures.get(index, "it could not be judged")
            judged = sum(score == score for score in values)  # noqa: PLR0124
            found.info.extend((name, mean, judged) for name, mean in answered.info.items())
            return


@dataclass(frozen=True)
class _Judged:
    scores: list[float | None]
    failures: list[str | None]
    info: list[tuple[str, float, int]]
    """Means, with the number of images that each is over."""


def _means(info: Sequence[tuple[str, float, int]]) -> dict[str, float]:
    weights, sums = dict[str, int](), dict[str, float]()
    for name, mean, count in info:
        if np.isfinite(mean):
            weights[name] = weights.get(name, 0) + count
            sums[name] = sums.get(name, 0.0) + count * mean
    return {name: sums[name] / weights[name] for name in sums if weights[name]}
