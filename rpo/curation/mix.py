"""The pairs of one or more runs as one stream: each run taken evenly, near-duplicates of earlier images left out.

Of runs with c_i pairs and shares s_i, N s_i pairs each are taken, with N = min_i c_i / s_i: the scarcest run is taken
whole. Pair j of a run is taken where ⌊(j + 1) N s_i / c_i⌋ grows, and the streams are merged by how far each one is, so
that every stretch of the result has the mix of the whole.

Nothing is held of the pairs but 8 bytes each, to know them again; leaving out near-duplicates takes one more pass, and
some 30 bytes for each record with pairs.
"""

import heapq
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from rpo.curation.duplicates import are_first
from rpo.curation.records import History, Instructions, Outcome, history_of
from rpo.curation.store.keys import Keys, key_of
from rpo.curation.store.run import CurationRun
from rpo.curation.store.shard import Shard

Wants = Callable[[Outcome, History], bool]


@dataclass(frozen=True)
class Found:
    """A pair, and where it is."""

    run: CurationRun
    shard: Shard
    history: History
    """Of the record that the pair was decided with."""
    outcome: Outcome


@final
class Mix:
    """The pairs of some runs, to go through once.

    Attributes:
        runs: The runs.
        written: Pairs of each run so far.
        left_out: Pairs that are left out, so far, by reason.
    """

    def __init__(
        self,
        runs: Sequence[CurationRun],
        shares: Sequence[float],
        *,
        wants: Wants | None = None,
        near_duplicates: int | None = None,
    ) -> None:
        """Look through the runs as far as need be.

        Args:
            shares: Of each run, above 0; only their ratios count.
            wants: Which pairs there are; None for all.
            near_duplicates: Bits in which near-duplicates differ at most, see `rpo.curation.duplicates`; None leaves
                nothing out.
        """
        self.runs, self._wants = runs, wants or (lambda outcome, history: True)
        self.written, self.left_out = [0 for _ in runs], {"near_duplicate": 0, "same": 0, "share": 0}
        self._keeps = None if near_duplicates is None else self._unlike(near_duplicates)
        # Of one run alone all is taken, and nobody needs to count.
        counts = [sum(1 for _ in self._kept(place)) for place in range(len(runs))] if len(runs) > 1 else [1]
        most = min(count / share for count, share in zip(counts, shares, strict=True))
        self._taken = [(count, round(share * most)) for count, share in zip(counts, shares, strict=True)]

    def __iter__(self) -> Iterator[Found]:
        """Every pair that is taken."""
        seen, streams = Keys(), [self._evenly(place) for place in range(len(self.runs))]
        for _, place, found in heapq.merge(*streams, key=lambda one: one[:2]):
            if seen.add(key_of(json.dumps([found.history.source.caption, *_digests(found)]))):
                self.written[place] += 1
                yield found
            else:
                self.left_out["same"] += 1

    def _evenly(self, place: int) -> Iterator[tuple[float, int, Found]]:
        """The pairs of a run that are taken, each with how far the run is with it."""
        count, wanted = self._taken[place]
        for number, found in enumerate(self._kept(place)):
            if (number + 1) * wanted // count > number * wanted // count:
                yield (number + 0.5) / count, place, found
            else:
                self.left_out["share"] += 1

    def _kept(self, place: int) -> Iterator[Found]:
        """The pairs of a run, but for those of near-duplicates."""
        keeps = None if self._keeps is None else iter(self._keeps[place])
        for shard, history, outcomes in self._records(place):
            if keeps is None or next(keeps):
                yield from (Found(self.runs[place], shard, history, one) for one in outcomes)

    def _records(self, place: int) -> Iterator[tuple[Shard, History, list[Outcome]]]:
        """The records of a run that have pairs."""
        for shard in self.runs[place].shards():
            for history in (history_of(shard, record) for record in shard.ids):
                if outcomes := [one for one in history.outcomes or () if one.chosen and self._wants(one, history)]:
                    yield shard, history, outcomes

    def _unlike(self, bits: int) -> list[np.ndarray]:
        """Of each record with pairs, by run, whether it looks like no earlier one."""
        looks, groups, pairs, ends = array("Q"), array("Q"), array("L"), list[int]()
        for place in range(len(self.runs)):
            for _, history, outcomes in self._records(place):
                looks.append(int(history.source.look, 16))
                groups.append(key_of(history.source.group))
                pairs.append(len(outcomes))
            ends.append(len(looks))
        kept = are_first(np.array(looks, np.uint64), np.array(groups, np.uint64), bits)
        self.left_out["near_duplicate"] = int(np.array(pairs, np.int64)[~kept].sum())
        return np.split(kept, ends[:-1])


def is_of_one_image(outcome: Outcome, history: History) -> bool:
    """Whether both sides are edits of the record's image by one instruction."""
    sides = [name.partition("/") for name in (outcome.first, outcome.second)]
    are_own = all(record == history.source.id and kind != "source" for record, _, kind in sides)
    return are_own and isinstance(history.instructions, Instructions)


def _digests(found: Found) -> list[str | None]:
    """The images of a pair."""
    names = [name.partition("/") for name in (found.outcome.chosen, found.outcome.rejected)]
    own, shard = found.history, found.shard
    owners = [own if record == own.source.id else history_of(shard, record) for record, _, _ in names]
    return [owner.image_of(kind) for owner, (_, _, kind) in zip(owners, names, strict=True)]
