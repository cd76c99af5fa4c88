"""The six stages of a run: what each takes of a record, asks of its component, and writes down."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

from PIL.Image import Image

from rpo.curation.blame import in_words
from rpo.curation.curate_config import CurateConfig, DecideConfig
from rpo.curation.decide import Candidate, Judged, Outcome, Reason, outcomes_across, outcomes_of, outcomes_of_siblings
from rpo.curation.folder import RunFolder
from rpo.curation.history import Edit, History, history_of, source_of, stage_is_ok
from rpo.curation.parts import Row
from rpo.curation.records import Critic, Critique, Editor, Fault, Instructions, Instructor
from rpo.curation.score import Scorer, Scores, ToScore
from rpo.curation.sources import Planned, SourcePlan
from rpo.curation.stages import Stage

Wanted = TypeVar("Wanted")


@dataclass(frozen=True)
class ToCriticise:
    """An image and its caption."""

    image: Image
    caption: str


@dataclass(frozen=True)
class ToInstruct:
    """An image, its caption, and what is wrong with it."""

    image: Image
    caption: str
    critique: Critique


@dataclass(frozen=True)
class ToEdit:
    """An image and what to do to it."""

    image: Image
    instructions: str
    seed: int


def sources_stage(folder: RunFolder, plan: SourcePlan, batch_size: int) -> Stage[Planned, Image]:
    """Draw or read the images of a plan; an item that cannot be read ends the run."""
    places = {item.id: order for order, item in enumerate(plan.items)}

    def keep(record: str, item: Planned, image: Image) -> Row:
        return {
            "caption": item.caption,
            "image": folder.save_image(image),
            "order": places[record],
            "origin": dict(item.origin),
            "group": item.group or item.id,
            "side": item.side,
        }

    def load(record: str) -> Planned:
        return plan.items[places[record]]

    return Stage("sources", batch_size, 1, lambda record: True, load, plan.draw, keep, is_strict=True)


def critiques_stage(folder: RunFolder, critic: Critic) -> Stage[ToCriticise, Critique]:
    """Ask what is wrong with every image."""

    def load(record: str) -> ToCriticise:
        return ToCriticise(*_seen(folder, record))

    def ask(items: Sequence[ToCriticise]) -> Sequence[Critique | Fault]:
        return critic([item.image for item in items], [item.caption for item in items])

    def keep(record: str, item: ToCriticise, answer: Critique) -> Row | Fault:
        return wrong_type(answer, Critique) or {"critique": answer.model_dump(mode="json")}

    who = in_words("critic", critic.identity)
    return Stage(
        "critiques", critic.batch_size, critic.concurrency, lambda record: True, load, ask, keep, component=who
    )


def instructions_stage(
    folder: RunFolder, instructor: Instructor, *, instruct_sound: bool
) -> Stage[ToInstruct, Instructions]:
    """Ask what to do about what is wrong; where nothing is, only with `instruct_sound`."""

    def critique(record: str) -> Critique:
        return Critique.model_validate(folder.stages["critiques"][record]["critique"])

    def wants(record: str) -> bool:
        if not stage_is_ok(folder, "critiques", record):
            return False
        return instruct_sound or not critique(record).nothing_to_fix

    def load(record: str) -> ToInstruct:
        return ToInstruct(*_seen(folder, record), critique(record))

    def ask(items: Sequence[ToInstruct]) -> Sequence[Instructions | Fault]:
        return instructor(
            [item.image for item in items], [item.caption for item in items], [item.critique for item in items]
        )

    def keep(record: str, item: ToInstruct, answer: Instructions) -> Row | Fault:
        return wrong_type(answer, Instructions) or {"instructions": list(answer.instructions)}

    who = in_words("instructor", instructor.identity)
    return Stage("instructions", instructor.batch_size, instructor.concurrency, wants, load, ask, keep, component=who)


def edits_stage(folder: RunFolder, editor: Editor, seed: int) -> Stage[ToEdit, Image]:
    """Carry out the instructions; an edit of another size than its source is a fault."""

    def instructions(record: str) -> Instructions:
        return Instructions.model_validate({"instructions": folder.stages["instructions"][record]["instructions"]})

    def wants(record: str) -> bool:
        return stage_is_ok(folder, "instructions", record) and not instructions(record).is_empty

    def load(record: str) -> ToEdit:
        return ToEdit(_seen(folder, record)[0], instructions(record).text, edit_seed(seed, record))

    def ask(items: Sequence[ToEdit]) -> Sequence[Image | Fault]:
        return editor(
            [item.image for item in items], [item.instructions for item in items], [item.seed for item in items]
        )

    def keep(record: str, item: ToEdit, answer: Image) -> Row | Fault:
        if fault := wrong_type(answer, Image):
            return fault
        if (answer.size, answer.mode) != (item.image.size, "RGB"):
            found, wanted = (f"{one.mode} {one.size[0]}x{one.size[1]}" for one in (answer, item.image))
            return Fault("invalid", f"the edit is {found}; expected {wanted}, as its source is")
        return {"image": folder.save_image(answer), "seed": item.seed}

    who = in_words("editor", editor.identity)
    return Stage("edits", editor.batch_size, editor.concurrency, wants, load, ask, keep, component=who)


def scores_stage(folder: RunFolder, scorer: Scorer, config: CurateConfig) -> Stage[ToScore, Scores]:
    """Score source and edit; where they are ordered with others, also sources that were not edited."""

    def wants(record: str) -> bool:
        if stage_is_ok(folder, "edits", record):
            return True
        is_pair = config.decide.orderings == "all" and bool(folder.stages["sources"][record]["side"])
        return is_pair or config.decide.orderings == "prompt"

    def load(record: str) -> ToScore:
        image, caption = _seen(folder, record)
        edit = history_of(folder, record).edit
        edited = folder.load_image(edit.image, _named(record, caption)) if isinstance(edit, Edit) else None
        critique = history_of(folder, record).critique
        return ToScore(caption, image, edited, critique if isinstance(critique, Critique) else None)

    def keep(record: str, item: ToScore, answer: Scores) -> Row:
        return asdict(answer)

    return Stage("scores", config.score_batch_size, 1, wants, load, scorer, keep, is_strict=True)


def decisions_stage(
    folder: RunFolder, rules: DecideConfig, groups: Mapping[str, Sequence[str]]
) -> Stage[str, tuple[Outcome, ...]]:
    """Decide what becomes of each record; outcomes across a given pair are written with its first record."""

    def decide(record: str) -> tuple[Outcome, ...]:
        history = history_of(folder, record)
        own = judged(history)
        found = outcomes_of(own, rules)
        members = groups.get(history.source.group, ())
        if rules.orderings == "all" and len(members) > 1 and members[0] == record:
            found += outcomes_across(own, judged(history_of(folder, members[1])), rules)
        if rules.orderings == "prompt" and members[0] == record:
            found += outcomes_of_siblings([judged(history_of(folder, one)) for one in members], rules)
        return tuple(found)

    def ask(records: Sequence[str]) -> list[tuple[Outcome, ...] | Fault]:
        return [decide(record) for record in records]

    def keep(record: str, item: str, answer: tuple[Outcome, ...]) -> Row:
        return {"outcomes": [asdict(one) for one in answer]}

    return Stage("decisions", 1, 1, lambda record: True, str, ask, keep, is_strict=True)


def judged(history: History) -> Judged:
    """What a decision needs of a record, and why it has no edit or no scores."""
    source, scores = history.source, history.scores
    known = scores if isinstance(scores, Scores) else None
    edit = Candidate(source.id, "edit", known.edit) if known is not None and known.edit is not None else None
    return Judged(
        source.id,
        Candidate(source.id, "source", known.source if known is not None else {}),
        edit,
        known.distance if known is not None else None,
        known.similarity if known is not None else None,
        None if edit is not None else _reason(history),
        "chosen" if source.side == "chosen" else "rejected" if source.side else "",
    )


def edit_seed(seed: int, record: str) -> int:
    """The seed of a record's edit."""
    return int(hashlib.sha256(f"edit/{seed}/{record}".encode()).hexdigest()[:12], 16)


def wrong_type(answer: object, wanted: type[Wanted]) -> Fault | None:
    """The fault of a component that answered with something else; None if it did not."""
    if isinstance(answer, wanted):
        return None
    if answer is None:
        return Fault("empty", f"the component gave nothing; expected a {wanted.__name__}")
    return Fault("invalid", f"the component gave a {type(answer).__name__}; expected a {wanted.__name__}", str(answer))


def _reason(history: History) -> Reason:
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


def _seen(folder: RunFolder, record: str) -> tuple[Image, str]:
    """Image and caption of a record."""
    source = source_of(folder.stages["sources"][record])
    return folder.load_image(source.image, _named(record, source.caption)), source.caption


def _named(record: str, caption: str) -> str:
    return f"record {record} ({caption!r})"
