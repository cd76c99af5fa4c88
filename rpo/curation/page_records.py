"""One record as the page shows it: every text ready to be read, every number already written.

The browser only lays out what is here, so that what a person reads is decided, and tested, in one place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rpo.curation.decide import Outcome
from rpo.curation.history import Edit, History
from rpo.curation.manifest import Identity
from rpo.curation.page_outcomes import FAULT_WORDS, UNDECIDED, WORDS, fate_of, faults_of, own_outcome
from rpo.curation.records import Critique, Instructions
from rpo.curation.score import Scores

Facts = tuple[tuple[str, str], ...]
"""Names and values."""

SEVERITIES = {1: "blemish", 2: "serious", 3: "contradicts the caption"}

_HASH_CHARACTERS = 12  # of a sha256: enough to recognise it by
_DECIMALS = ((10, 3), (1000, 2))
_FEW = 5e-4  # below, three decimals would show a change as none


@dataclass(frozen=True)
class ShownFault:
    """A fault: of what, of which kind, why, and what the model said."""

    of: str
    kind: str
    words: str
    message: str
    raw: str


@dataclass(frozen=True)
class ShownScore:
    """One number of source and edit."""

    name: str
    role: str
    """What it is for, such as "filter"."""
    source: str
    edit: str
    change: str
    """With its sign; empty where there is no edit."""
    direction: str
    """"up", "down", "same" or empty."""


@dataclass(frozen=True)
class ShownImages:
    """The images of a record, as addresses; empty where there is none."""

    source: str
    edit: str
    difference: str
    has_pixels: bool
    """Whether they are small enough to be enlarged without blur."""
    size: tuple[int, int]


@dataclass(frozen=True)
class ShownRecord:
    """Everything that the page says of one record; its images are addresses, empty where there is none."""

    id: str
    caption: str
    outcome: str
    """A key of `WORDS`."""
    because: str
    """Who preferred it, for a pair."""
    images: ShownImages
    critique: Critique | None
    instructions: tuple[str, ...] | None
    starts: tuple[str, ...]
    """The first words of the instructions, to filter by."""
    faults: tuple[ShownFault, ...]
    scores: tuple[ShownScore, ...]
    measures: Facts
    others: tuple[str, ...]
    """What became of it together with other images of its group."""
    provenance: Facts

    @property
    def data(self) -> dict[str, object]:
        """As JSON takes it."""
        return {
            **vars(self),
            "images": vars(self.images),
            "critique": self.critique.model_dump(mode="json") if self.critique is not None else None,
            "faults": [vars(one) for one in self.faults],
            "scores": [vars(one) for one in self.scores],
        }


def shown_record(
    history: History, images: ShownImages, across: Sequence[Outcome], manifest: Mapping[str, Identity]
) -> ShownRecord:
    """What the page says of a record.

    Args:
        across: Outcomes of its images together with those of other records.
    """
    record = history.source.id
    outcome = own_outcome(history)
    judge = manifest.get("scores", {}).get("evaluation") or "evaluation"
    told = history.instructions.instructions if isinstance(history.instructions, Instructions) else None
    return ShownRecord(
        id=record,
        caption=history.source.caption,
        outcome=fate_of(history).outcome,
        because=_because(outcome) if outcome is not None and outcome.chosen else "",
        images=images,
        critique=history.critique if isinstance(history.critique, Critique) else None,
        instructions=told,
        starts=tuple(dict.fromkeys(text.split()[0].lower() for text in told or ())),
        faults=tuple(
            ShownFault(name, one.kind, FAULT_WORDS[one.kind], one.message, one.raw) for name, one in faults_of(history)
        ),
        scores=_scores(history.scores, judge) if isinstance(history.scores, Scores) else (),
        measures=_measures(history.scores) if isinstance(history.scores, Scores) else (),
        others=tuple(_in_words(one, record) for one in across),
        provenance=_provenance(history, manifest),
    )


def written(value: float) -> str:
    """A score as people read it: three decimals, fewer for large numbers, two digits for tiny ones."""
    if value == 0:
        return "0"
    if abs(value) < _FEW:
        return f"{value:.1e}".replace("-", "−")
    decimals = next((number for limit, number in _DECIMALS if abs(value) < limit), 0)
    return f"{value:.{decimals}f}".replace("-", "−")


def _scores(scores: Scores, judge: str) -> tuple[ShownScore, ...]:
    edit = scores.edit
    filters = [_score(name, "filter", value, edit[name] if edit else None) for name, value in scores.source.items()]
    judged = scores.evaluation
    evaluation = [_score(judge, "evaluates, never decides", judged["source"], judged.get("edit"))] if judged else []
    return (*filters, *evaluation)


def _score(name: str, role: str, source: float, edit: float | None) -> ShownScore:
    if edit is None:
        return ShownScore(name, role, written(source), "", "", "")
    change = edit - source
    direction = "up" if change > 0 else "down" if change < 0 else "same"
    sign = "+" if change > 0 else ""
    return ShownScore(name, role, written(source), written(edit), sign + written(change), direction)


def _measures(scores: Scores) -> Facts:
    found = {"mean difference of the pixels": scores.distance, "cosine of the embeddings": scores.similarity}
    return tuple((name, written(value)) for name, value in found.items() if value is not None)


def _because(outcome: Outcome) -> str:
    kind, _, name = outcome.label.partition(":")
    words = {"reward": f"{name} says so", "edit": "the policy says so", "given": "the pair came with this label"}
    return words.get(kind, outcome.label)


def _in_words(outcome: Outcome, record: str) -> str:
    def named(image: str) -> str:
        owner, _, kind = image.partition("/")
        return f"this {kind}" if owner == record else f"the {kind} of {owner}"

    if outcome.chosen:
        return f"{named(outcome.chosen)} preferred to {named(outcome.rejected)} ({_because(outcome)})"
    reason = WORDS[outcome.reason or UNDECIDED][0]
    return f"{named(outcome.first)} and {named(outcome.second)}: no pair, {reason}"


def _provenance(history: History, manifest: Mapping[str, Identity]) -> Facts:
    source, edit = history.source, history.edit
    asked = {"critic": history.critique, "instructor": history.instructions, "editor": edit}
    stages = {"critic": "critiques", "instructor": "instructions", "editor": "edits"}
    facts = [("record", source.id), ("source", ", ".join(f"{name} {value}" for name, value in source.origin.items()))]
    facts += [(name, who(manifest.get(stages[name], {}))) for name, result in asked.items() if result is not None]
    if source.group != source.id:
        facts.append(("done together with", f"{source.group}, as its {source.side} side"))
    facts.append(("source image", f"images/{source.image}.png"))
    if isinstance(edit, Edit):
        facts += [("edit image", f"images/{edit.image}.png"), ("seed of the edit", str(edit.seed))]
    return tuple(facts)


def who(identity: Identity) -> str:
    """A component in a line: kind, model, revision, and the start of the hash of its prompt."""
    parts = [identity.get("kind", "of one's own"), identity.get("model", "")]
    if identity.get("revision"):
        parts.append(f"revision {identity['revision'][:_HASH_CHARACTERS]}")
    if identity.get("prompt_sha256"):
        parts.append(f"prompt {identity['prompt_sha256'][:_HASH_CHARACTERS]}…")
    return ", ".join(part for part in parts if part)
