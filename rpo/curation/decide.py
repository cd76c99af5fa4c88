"""Which images become a pair, which of the two is preferred, and why the others were dropped: pure functions of scores.

An edit that changed nothing, or everything, is not used at all. Of the rest, the first reward that filters says which
image is better; its margin, and with `agreement` the other rewards with theirs, must bear it out. Every pair that could
have been made has an outcome: kept with a label, or dropped for one reason.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rpo.curation.curate_config import DecideConfig
from rpo.curation.records import Critique, Edit, History, Instructions, Outcome, Reason, Scores
from rpo.errors import InputError


@dataclass(frozen=True)
class Candidate:
    """An image that may be a side of a pair."""

    record: str
    kind: str
    """"source", "edit", or "edit-1" and so on for further ones."""
    scores: Mapping[str, float]
    """By each reward that filters."""

    @property
    def name(self) -> str:
        """What a decision calls it, as in "0123456789abcdef/edit"."""
        return f"{self.record}/{self.kind}"


def source_of(history: History) -> Candidate:
    """The source of a record, with its scores if there are any."""
    scores = history.scores.source if isinstance(history.scores, Scores) else {}
    return Candidate(history.source.id, "source", scores)


def edit_of(history: History) -> Candidate | None:
    """The edit of a record, if it has been scored."""
    scores = history.scores.edit if isinstance(history.scores, Scores) else None
    return None if scores is None else Candidate(history.source.id, "edit", scores)


def edits_of(history: History) -> list[Candidate]:
    """All edits of a record that have been scored."""
    edit, scores = edit_of(history), history.scores
    if edit is None or not isinstance(scores, Scores):
        return []
    numbered = enumerate(scores.others, start=1)
    return [edit, *(Candidate(edit.record, f"edit-{number}", one) for number, one in numbered)]


def outcomes_of(record: History, rules: DecideConfig) -> list[Outcome]:
    """What becomes of an edit and its own source, and of several edits."""
    source, edit = source_of(record), edit_of(record)
    if edit is None:
        return [Outcome(source.name, f"{record.source.id}/edit", reason=why_not_edited(record))]
    among = _ordered(edits_of(record), rules)
    if reason := outside_window(record, rules):
        return [Outcome(source.name, edit.name, reason=reason), *among]
    return [compare(source, edit, rules), *among]


def outcomes_across(first: History, second: History, rules: DecideConfig) -> list[Outcome]:
    """What becomes of images of the two sides of a given pair: side and side, side and other edit, edit and edit."""
    sources = source_of(first), source_of(second)
    preferred = sources[0] if first.source.side == "chosen" else sources[1]
    found = [Outcome(sources[0].name, sources[1].name, preferred.name, "given")]
    edits = [
        (edit, other)
        for record, other in ((first, sources[1]), (second, sources[0]))
        if (edit := edit_of(record)) is not None and not outside_window(record, rules)
    ]
    found += [compare(other, edit, rules) for edit, other in edits if other.scores]
    if len(edits) == len(sources):
        found.append(compare(edits[0][0], edits[1][0], rules))
    return found


def outcomes_of_siblings(records: Sequence[History], rules: DecideConfig) -> list[Outcome]:
    """What becomes of the model's own images of one prompt: best against worst, second best against second, ..."""
    return _ordered([source for source in map(source_of, records) if source.scores], rules)


def _ordered(images: Sequence[Candidate], rules: DecideConfig) -> list[Outcome]:
    leading = next(iter(rules.rewards))
    ranked = sorted(images, key=lambda image: -image.scores[leading])
    couples = zip(ranked[: len(ranked) // 2], reversed(ranked), strict=False)
    return [compare(worse, better, rules) for better, worse in couples]


def compare(first: Candidate, second: Candidate, rules: DecideConfig) -> Outcome:
    """Which of two images is better by the rules."""
    names = (first.name, second.name)
    is_edit_of = (first.kind, second.kind) == ("source", "edit")
    if rules.policy == "always_edit":
        return Outcome(*names, second.name, "edit") if is_edit_of else Outcome(*names, reason="no_rule")
    gaps = {name: second.scores[name] - first.scores[name] for name in rules.rewards}
    leading = next(iter(rules.rewards))
    if gaps[leading] == 0:
        return Outcome(*names, reason="equal_scores")
    if is_edit_of and gaps[leading] < 0 and rules.policy == "keep_improved":
        return Outcome(*names, reason="got_worse")
    if reason := _not_borne_out(gaps, leading, rules):
        return Outcome(*names, reason=reason)
    better = second if gaps[leading] > 0 else first
    if any(better.scores[name] < least for name, least in rules.min_chosen.items()):
        return Outcome(*names, reason="not_good")
    return Outcome(*names, better.name, f"reward:{leading}")


def outside_window(record: History, rules: DecideConfig) -> Reason | None:
    """Why an edit is too near to its source, or too far from it, to be used; None if it is neither."""
    scores = record.scores
    if not isinstance(scores, Scores):
        return None
    if scores.distance is not None and scores.distance < rules.min_distance:
        return "too_close"
    if scores.distance is not None and scores.distance > rules.max_distance:
        return "too_far"
    if scores.similarity is not None and scores.similarity < rules.min_similarity:
        return "too_dissimilar"
    if scores.similarity is not None and scores.similarity > rules.max_similarity:
        return "too_similar"
    return None


def why_not_edited(history: History) -> Reason:
    """Why a record has no edit, or none with scores."""
    critique, instructions = history.critique, history.instructions
    if not isinstance(critique, Critique):
        return "critique_fault"
    if instructions is None:
        return "nothing_to_fix"
    if not isinstance(instructions, Instructions):
        return "instruction_fault"
    if instructions.is_empty:
        return "no_instructions"
    return "score_fault" if isinstance(history.edit, Edit) else "edit_fault"


def check_rules(rules: DecideConfig) -> None:
    """Refuse rules that no pair could meet, or that say nothing."""
    if strangers := [name for name in rules.min_chosen if name not in rules.rewards]:
        raise InputError(
            f"decide.min_chosen names {strangers[0]!r}, which is not among decide.rewards "
            f"({', '.join(rules.rewards)}); expected one of them; add it there with the margin 0"
        )
    if rules.orderings == "prompt" and rules.policy == "always_edit":
        raise InputError(
            "decide.orderings is 'prompt' and decide.policy 'always_edit', which orders no siblings; give another "
            "policy, or decide.orderings=own"
        )
    windows = {"distance": (rules.min_distance, rules.max_distance)}
    if rules.similarity_model:
        windows["similarity"] = (rules.min_similarity, rules.max_similarity)
    for name, (low, high) in windows.items():
        if not low < high:
            raise InputError(
                f"decide.min_{name} is {low} and decide.max_{name} {high}; expected the first to be less; change one"
            )


def _not_borne_out(gaps: Mapping[str, float], leading: str, rules: DecideConfig) -> Reason | None:
    sign = 1 if gaps[leading] > 0 else -1
    counting: Sequence[str] = list(gaps) if rules.agreement else [leading]
    if any(sign * gaps[name] <= 0 for name in counting):
        return "disagreement"
    if any(sign * gaps[name] < rules.rewards[name] for name in counting):
        return "small_margin"
    return None
