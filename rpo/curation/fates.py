"""What became of records: one outcome each, in words, counted by stage, and a fair selection of all outcomes.

A record's outcome is that of its edit and its own source; a record of a run that is under way may have none yet.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import get_args

from rpo.curation.records import Critique, Edit, Fault, FaultKind, History, Instructions, Outcome, Scores, Window

KEPT_EDIT, KEPT_SOURCE, UNDECIDED = "kept_edit", "kept_source", "undecided"

WORDS: dict[str, tuple[str, str]] = {
    KEPT_EDIT: ("edit preferred", "Kept as a pair: the edit is chosen, its source rejected."),
    KEPT_SOURCE: ("source preferred", "Kept as a pair: the source is chosen, its edit rejected."),
    "critique_fault": ("no critique", "The critic gave no critique that could be used."),
    "nothing_to_fix": ("nothing to fix", "The critic found no problem, so nothing was edited."),
    "instruction_fault": ("no usable instructions", "The instructor gave no instructions that could be used."),
    "no_instructions": ("no instructions", "The instructor saw nothing that an editor could do."),
    "edit_fault": ("no edit", "The editor gave no image that could be used."),
    "score_fault": ("no scores", "A reward gave no number for an image."),
    "too_close": ("hardly changed", "Source and edit differ by less than the window allows."),
    "too_far": ("changed too much", "Source and edit differ by more than the window allows."),
    "too_dissimilar": ("too dissimilar", "The similarity model sees source and edit as two different images."),
    "too_similar": ("too similar", "The similarity model hardly tells source and edit apart."),
    "equal_scores": ("equal scores", "The first reward gives both images the same score."),
    "got_worse": ("edit got worse", "The first reward prefers the source, and the policy keeps improvements only."),
    "small_margin": ("margin too small", "The rewards differ by less than their margins."),
    "not_good": ("not good enough", "The better image scores less than is asked of a preferred one."),
    "disagreement": ("rewards disagree", "The rewards do not agree on which image is better."),
    "no_rule": ("no rule", "No rule says which image is better."),
    UNDECIDED: ("not decided yet", "The run has not come this far with the record."),
}
"""Each outcome by name, and in a sentence; in the order in which they are shown."""

FAULT_WORDS: dict[FaultKind, str] = {
    "parse_error": "no JSON",
    "invalid": "not of the form asked for",
    "raised": "exception",
    "empty": "no answer",
}
"""Kinds of faults, for people."""

STEPS = (
    "images",
    "criticised",
    "with something to fix",
    "instructed",
    "edited",
    "scored",
    "changed enough, not too much",
    "kept as pairs",
)
"""What a record goes through."""

_HELD = 4  # times as many of a group as may be selected, before those that cannot be are let go


@dataclass(frozen=True)
class Fate:
    """What became of one record, without anything that takes room."""

    record: str
    outcome: str
    """A key of `WORDS`."""
    faults: tuple[FaultKind, ...]
    last_step: int
    """Index of the last of `STEPS` that it came through."""


@dataclass(frozen=True)
class Step:
    """How many records came through one of `STEPS`, and what became of those that did not come through the next."""

    name: str
    count: int
    lost: tuple[tuple[str, int], ...]
    """Outcomes and how often, the most frequent first."""


def fate_of(history: History) -> Fate:
    """What became of a record."""
    outcome, critique, told = history.own_outcome, history.critique, history.instructions
    name = _name_of(outcome)
    came_through = (
        isinstance(critique, Critique),
        told is not None or (isinstance(critique, Critique) and not critique.nothing_to_fix),
        isinstance(told, Instructions) and not told.is_empty,
        isinstance(history.edit, Edit),
        isinstance(history.scores, Scores),
        outcome is not None and name not in get_args(Window),
        name in (KEPT_EDIT, KEPT_SOURCE),
    )
    last_step = next((step for step, is_through in enumerate(came_through) if not is_through), len(came_through))
    return Fate(history.source.id, name, tuple(fault.kind for _, fault in faults_of(history)), last_step)


def faults_of(history: History) -> list[tuple[str, Fault]]:
    """The faults of a record, each with what it is a fault of."""
    found = {
        "critique": history.critique,
        "instructions": history.instructions,
        "edit": history.edit,
        "scores": history.scores,
    }
    return [(name, one) for name, one in found.items() if isinstance(one, Fault)]


def count_steps(fates: Iterable[Fate]) -> list[Step]:
    """How many records came through each step."""
    lost: list[Counter[str]] = [Counter() for _ in STEPS]
    for one in fates:
        lost[one.last_step][one.outcome] += 1
    last = len(STEPS) - 1
    return [
        Step(name, sum(one.total() for one in lost[step:]), _ordered(lost[step]) if step < last else ())
        for step, name in enumerate(STEPS)
    ]


def select(fates: Iterable[Fate], limit: int) -> list[Fate]:
    """At most `limit` records, in the order given, with as equal a number of every outcome and kind of fault as can be.

    Of one outcome those with the lowest ids are taken; ids are hashes, so that nobody has picked them, and a run that
    goes on keeps most of them.
    """
    groups: dict[tuple[int, tuple[FaultKind, ...]], list[tuple[str, int, Fate]]] = {}
    order = {outcome: place for place, outcome in enumerate(WORDS)}
    for number, one in enumerate(fates):
        members = groups.setdefault((order[one.outcome], one.faults), [])
        members.append((one.record, number, one))
        if len(members) > _HELD * limit:
            members[:] = _lowest(members, limit)
    ranked = sorted(
        (rank, group, member)
        for group, members in groups.items()
        for rank, member in enumerate(_lowest(members, limit))
    )
    return [one for _, one in sorted((member[1:] for _, _, member in ranked[:limit]), key=lambda placed: placed[0])]


def _lowest(members: list[tuple[str, int, Fate]], limit: int) -> list[tuple[str, int, Fate]]:
    return sorted(members, key=lambda member: member[:2])[:limit]


def _name_of(outcome: Outcome | None) -> str:
    if outcome is None:
        return UNDECIDED
    if outcome.reason is not None:
        return outcome.reason
    return KEPT_EDIT if outcome.chosen.endswith("/edit") else KEPT_SOURCE


def _ordered(counts: Counter[str]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(counts.items(), key=lambda item: (-item[1], list(WORDS).index(item[0]))))
