"""What each of several rewards does to the sum that is learnt from."""

from collections.abc import Iterator, Mapping

import torch

from rpo.trainers.checks.preflight import ZERO, Check
from rpo.trainers.rollouts.draw import Rollout

LEAST_SHARE = 0.01
"""Of the spread of all rewards; one with less decides nothing."""


def score_checks(rollout: Rollout, weights: Mapping[str, float], *, are_normalised: bool) -> Iterator[Check]:
    """Of each of several rewards: whether it differs within prompts, and what part it has in the sum.

    Args:
        are_normalised: Whether each is brought to one spread before it is weighted.
    """
    if len(weights) == 1:
        return  # which the preflight has looked at, with further draws
    groups = [(rollout.group == label) & rollout.judged for label in rollout.group.unique()]
    spreads = {
        name: torch.stack([part[group].std(correction=0) for group in groups if group.any()]).mean().item()
        for name, part in rollout.parts.items()
    }
    weighted = {name: abs(weights[name]) * (1.0 if are_normalised else spread) for name, spread in spreads.items()}
    for name, spread in spreads.items():
        share = weighted[name] / (sum(weighted.values()) or 1.0)
        size = rollout.parts[name][rollout.judged].abs().max().item()
        yield Check(
            f"reward {name}",
            spread > ZERO * size and share >= LEAST_SHARE,
            f"spreads by {spread:.3g} among the images of a prompt, {share:.1%} of the weighted sum's",
            "raise its weight, or leave it out"
            if spread > ZERO * size
            else "it is the same for all images of a prompt: leave it out, or look at it on a few images",
        )
