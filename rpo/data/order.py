"""The order in which an endless run visits a finite set: a function of the position alone.

Position p of the run is item `permutation(epoch)[p mod n]` of epoch p // n. Nothing is remembered, so resuming at
position p is exact, several processes slice one order, and every update has the same number of samples at the end of
an epoch too.
"""

from functools import lru_cache

import torch

from rpo.randomness import keyed_generator


@lru_cache(maxsize=4)
def epoch_order(num_items: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The permutation of one epoch."""
    return tuple(torch.randperm(num_items, generator=keyed_generator("order", seed, epoch), device="cpu").tolist())


def visit(num_items: int, seed: int, position: int) -> tuple[int, int]:
    """Which item the run visits at `position`, and in which epoch."""
    epoch, offset = divmod(position, num_items)
    return epoch_order(num_items, seed, epoch)[offset], epoch
