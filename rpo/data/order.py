"""The order in which an endless run visits a finite set: a function of the position alone.

Position p of the run is item `permutation(epoch)[p mod n]` of epoch p // n. Nothing is remembered, so resuming at
position p is exact, several processes slice one order, and every update has the same number of samples at the end of
an epoch too.

Where m items that follow each other have to be of one kind, `GroupedOrder` gives every kind b of n_b items such an
order of its own, and gives it groups of m. In epoch e kind b has floor((e + 1) n_b / m) - floor(e n_b / m) of them, and
a permutation says when. So after e epochs a kind has had its e n_b visits, but for less than a group; and of one kind
alone it is the order above.
"""

from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import final

import torch
from jaxtyping import Int
from torch import Tensor

from rpo.randomness import keyed_generator


@lru_cache(maxsize=4)
def epoch_order(num_items: int, seed: int, epoch: int) -> "array[int]":
    """The permutation of one epoch."""
    return _permutation(num_items, "order", seed, epoch)


def _permutation(count: int, *key: object) -> "array[int]":
    """8 bytes an item, where a tuple takes 40."""
    drawn = torch.randperm(count, generator=keyed_generator(*key), dtype=torch.long, device="cpu")
    return array("q", drawn.numpy().tobytes())


def visit(num_items: int, seed: int, position: int) -> tuple[int, int]:
    """Which item the run visits at `position`, and in which epoch."""
    epoch, offset = divmod(position, num_items)
    return epoch_order(num_items, seed, epoch)[offset], epoch


@final
class GroupedOrder:
    """The visits of a set of several kinds of item, in groups that are of one kind each."""

    def __init__(self, counts: Sequence[int], group: int, seed: int) -> None:
        """Order `counts[b]` items of each kind b in groups of `group`."""
        self.counts, self.group, self.seed = tuple(counts), group, seed
        self._groups = (
            0,
            torch.empty(0, 2, dtype=torch.long, device="cpu"),
        )  # of the epoch that was asked last: its first, and all
        self._items: dict[int, tuple[int, array[int]]] = {}  # of each kind: its epoch, and the order in it

    def visit(self, position: int) -> tuple[int, int, int]:
        """Which kind the run visits at `position`, which item of it, and in which of the kind's epochs."""
        group, offset = divmod(position, self.group)
        kind, own = self._group(group)
        epoch, place = divmod(own * self.group + offset, self.counts[kind])
        known = self._items.get(kind)
        if known is None or known[0] != epoch:
            known = self._items[kind] = epoch, _permutation(self.counts[kind], "order", self.seed, epoch)
        return kind, known[1][place], epoch

    def _group(self, group: int) -> tuple[int, int]:
        """The kind of a group, and how many groups that kind had before it."""
        if len(self.counts) == 1:
            return 0, group
        first, drawn = self._groups
        if not first <= group < first + len(drawn):
            first, drawn = self._groups = self._epoch_of(group)
        kind, own = drawn[group - first].tolist()
        return kind, own

    def _epoch_of(self, group: int) -> tuple[int, Int[Tensor, "groups 2"]]:
        """The first group of the epoch that has this one, and kind and number of each of its groups."""
        epoch = group * self.group // sum(self.counts)  # this one or a later one
        while sum(self._had(epoch + 1)) <= group:
            epoch += 1
        numbers = [
            torch.arange(*some, device="cpu") for some in zip(self._had(epoch), self._had(epoch + 1), strict=True)
        ]
        kinds = torch.cat([torch.full_like(some, kind) for kind, some in enumerate(numbers)])
        order = _permutation(len(kinds), "groups", self.seed, epoch)
        kinds = kinds[torch.tensor(order, device="cpu")]
        own = torch.empty_like(kinds)
        for kind, some in enumerate(numbers):
            own[kinds == kind] = some
        return sum(self._had(epoch)), torch.stack([kinds, own], dim=1)

    def _had(self, epochs: int) -> list[int]:
        """Groups of each kind in the first epochs."""
        return [epochs * count // self.group for count in self.counts]
