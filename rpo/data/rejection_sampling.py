"""Pairs by statistical rejection sampling (RSO, Liu et al., arXiv:2309.06657), as if a better policy had drawn them.

The policy that DPO aims at is the base tilted by exp(reward / temperature). Samples of it can be had from samples of
the base: accept y with probability exp((r(y) - r_max) / temperature). Accepted samples are paired at random, and each
pair is labelled by a Bradley-Terry draw, the better one chosen with probability sigmoid((r_1 - r_2) / label
temperature). RainbowPO found that it helps DPO alone, and hurts with normalisation.

r_max is that of the samples at hand, so the best one is always accepted: with few of them the tilt is too weak.
"""

import math
from collections.abc import Sequence

import torch

from rpo.errors import InputError
from rpo.randomness import keyed_generator


def accepted(rewards: Sequence[float], *, temperature: float, seed: int, key: str) -> list[int]:
    """Which of the samples of one prompt are kept, in their order.

    Args:
        temperature: Of the tilt, > 0, in units of the rewards; small keeps the best alone, infinite keeps all.
    """
    if not temperature > 0:
        raise InputError(f"temperature is {temperature}; expected a number > 0; try the rewards' standard deviation")
    if bad := [index for index, reward in enumerate(rewards) if not math.isfinite(reward)]:
        raise InputError(f"{key}: reward {bad[0]} is {rewards[bad[0]]}; expected finite numbers; leave that sample out")
    best = max(rewards, default=0.0)
    chances = [math.exp((reward - best) / temperature) for reward in rewards]
    # Draws are below 1, so that the best is always kept.
    return [index for index, draw in enumerate(_draws(len(rewards), "accept", seed, key)) if draw < chances[index]]


def rejection_sampled_pairs(
    rewards: Sequence[float], *, temperature: float, label_temperature: float, seed: int, key: str
) -> list[tuple[int, int]]:
    """Pairs (chosen, rejected) among the accepted samples of one prompt; no sample is used twice.

    Samples of equal reward tell nothing and are not paired with each other's draw: such a pair is left out.

    Args:
        label_temperature: Of the Bradley-Terry labels, >= 0, in units of the rewards; 0 always prefers the better one.
    """
    if not label_temperature >= 0:
        raise InputError(f"label_temperature is {label_temperature}; expected a number >= 0; 0 labels without noise")
    kept = accepted(rewards, temperature=temperature, seed=seed, key=key)
    order = torch.randperm(len(kept), generator=keyed_generator("pair", seed, key), device="cpu").tolist()
    couples = [(kept[order[at]], kept[order[at + 1]]) for at in range(0, len(order) - 1, 2)]
    draws = _draws(len(kept), "label", seed, key)
    return [
        (first, second) if draw < _probability(rewards[first] - rewards[second], label_temperature) else (second, first)
        for (first, second), draw in zip(couples, draws[: len(couples)], strict=True)
        if rewards[first] != rewards[second]
    ]


def _probability(gap: float, temperature: float) -> float:
    if temperature == 0:
        return float(gap > 0)
    return 0.5 * (1 + math.tanh(gap / (2 * temperature)))  # sigmoid that cannot overflow


def _draws(count: int, *key: object) -> list[float]:
    return torch.rand(count, generator=keyed_generator(*key), dtype=torch.float64, device="cpu").tolist()
