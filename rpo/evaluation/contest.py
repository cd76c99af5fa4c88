"""Two models on the same prompts and noise: how far apart their scores are, and how often each has the better image.

    difference    mean of (after - before) over images, paired image by image
    win rate      share of images on which after scores higher; a tie counts half

Both with 95 % intervals over prompts (`rpo.evaluation.intervals`), over all prompts and for each category. Diversity is
compared in the same way, prompt by prompt: it is the mean distance between two images of one prompt, in pixels and, by
a reward that has one, in a learned embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rpo.evaluation.comparison import PairedComparison, mean_comparison
from rpo.evaluation.intervals import Interval, win_rate

ALL = "all"
"""What all categories together are called."""


@dataclass(frozen=True)
class Contest:
    """Two models by one measure, on all prompts or on those of a category."""

    means: PairedComparison
    """Of both, and the difference; its name is the category."""
    win_rate: Interval
    """Of the second."""
    wins: int
    ties: int
    losses: int


def contest(name: str, before: Sequence[float], after: Sequence[float], groups: Sequence[object]) -> Contest:
    """Compare two models' scores, one per image.

    Args:
        name: What the prompts have in common.
        groups: The prompt of every image.
    """
    signs = np.sign(np.asarray(after) - np.asarray(before))
    return Contest(
        mean_comparison(name, before, after, groups=groups),
        win_rate(before, after, groups=groups),
        *(int((signs == sign).sum()) for sign in (1, 0, -1)),
    )


def contests(
    before: Sequence[float], after: Sequence[float], *, categories: Sequence[str], groups: Sequence[object]
) -> tuple[Contest, ...]:
    """Over all prompts and, if they are of several, for each category."""
    found = [contest(ALL, before, after, groups)]
    names = list(dict.fromkeys(categories))
    for name in names if len(names) > 1 else ():
        own = [number for number, one in enumerate(categories) if one == name]
        sides = [[scores[number] for number in own] for scores in (before, after)]
        found.append(contest(name, sides[0], sides[1], [groups[number] for number in own]))
    return tuple(found)


def pixel_diversity(images: NDArray[np.uint8], per_prompt: int) -> list[float]:
    """Of each prompt's images [n, height, width, 3], the mean absolute difference of two of them, of pixels in [0, 1].

    Args:
        per_prompt: Images of each prompt, which lie beside each other; 2 or more.
    """
    pairs = list(combinations(range(per_prompt), 2))
    prompts = np.split(images.astype(np.int16), len(images) // per_prompt)
    return [float(np.mean([np.abs(own[a] - own[b]).mean() for a, b in pairs]) / 255) for own in prompts]


def embedding_diversity(embeddings: Tensor, per_prompt: int) -> list[float]:
    """The same of unit embeddings [n, dim], whose distance is 1 - cos."""
    own = embeddings.double().cpu().unflatten(0, (-1, per_prompt))
    cosines = own @ own.mT
    upper = torch.triu(torch.ones(per_prompt, per_prompt, dtype=torch.bool), diagonal=1)
    return (1 - cosines[:, upper]).mean(1).tolist()
