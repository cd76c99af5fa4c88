"""The mark of a shard: where it is, what made each stage of it, and what came of its records, in numbers.

All that a run has come to is the sum of its marks.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from rpo.curation.store.address import Store

StageName = Literal["sources", "critiques", "instructions", "edits", "scores", "decisions"]
"""The stages, in their order."""

STAGES: tuple[StageName, ...] = get_args(StageName)

Identity = Mapping[str, str]
"""The plain values that decide the results of a stage: model, revision, sha256 of the prompt template, decoding …"""

FOLDER = "shards"


@dataclass(frozen=True)
class Tally:
    """What came of some records, in numbers; the tallies of shards add up to that of a run."""

    done: Mapping[str, int] = field(default_factory=dict)
    """Records that each stage is through with."""
    faults: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Of these the faults, by stage and kind."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """That each stage was at work."""
    kept: Mapping[str, int] = field(default_factory=dict)
    """Pairs, by who says which image is better."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Pairs that were not made, by reason."""
    evaluation: Mapping[str, float] = field(default_factory=dict)
    """Of the kept pairs that the evaluating reward was asked about: "better", "equal", "worse" and the "gap" in all."""

    def __add__(self, other: "Tally") -> "Tally":
        """Both together."""
        return Tally(**{name: _sum(one, vars(other)[name]) for name, one in vars(self).items()})

    def through(self, num_stages: int) -> "Tally":
        """The same of the first stages alone."""
        known = set(STAGES[:num_stages])
        parts = {
            name: {stage: one for stage, one in vars(self)[name].items() if stage in known}
            for name in ("done", "faults", "seconds")
        }
        is_decided = num_stages == len(STAGES)
        return Tally(**parts, **({n: vars(self)[n] for n in ("kept", "dropped", "evaluation")} if is_decided else {}))


def _sum(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(one)
    for name, value in other.items():
        if isinstance(value, Mapping):
            found[name] = _sum(found.get(name, {}), value)
        else:
            found[name] = found.get(name, 0) + value
    return found


@dataclass(frozen=True)
class ShardMark:
    """Says that a shard is sealed, where, by what it was made, and what came of it."""

    number: int
    start: int
    """Place of its first record in the plan."""
    records: int
    plan: str
    """sha256 of its records' ids: another plan is another shard."""
    file: str
    sha256: str
    stages: Mapping[StageName, str]
    """The stages that it has been through, each with the hash of what made it."""
    tally: Tally

    @property
    def name(self) -> str:
        """The file that it is kept in."""
        return mark_name(self.number)

    def num_stages(self, made_by: Mapping[StageName, str]) -> int:
        """How many of its first stages were made as `made_by` says; what came of another stage does not count."""
        for number, stage in enumerate(STAGES):
            if stage not in self.stages or self.stages[stage] != made_by.get(stage):
                return number
        return len(STAGES)


def mark_name(number: int) -> str:
    """The file of a shard's mark."""
    return f"{FOLDER}/{number:07}.json"


def read_mark(data: bytes) -> ShardMark | None:
    """A mark; None for the half of one, on a disk that renames no whole files."""
    try:
        found = json.loads(data)
        return ShardMark(**{**found, "tally": Tally(**found["tally"])})
    except (ValueError, KeyError, TypeError):
        return None


def mark_of(store: Store, number: int) -> ShardMark | None:
    """The mark of a shard, if it has one."""
    try:
        return read_mark(store.read(mark_name(number)))
    except FileNotFoundError:
        return None


def read_marks(store: Store) -> Iterator[ShardMark]:
    """The marks that there are, in the order of their shards' numbers."""
    names = [name for name in store.names(FOLDER) if name.endswith(".json")]
    for start in range(0, len(names), _AT_ONCE):
        some = [f"{FOLDER}/{name}" for name in names[start : start + _AT_ONCE]]
        found = store.read_all(some)
        for name in some:
            if name in found and (mark := read_mark(found[name])) is not None:
                yield mark


_AT_ONCE = 512  # marks
