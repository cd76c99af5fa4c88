"""The six stages of a run, one function each: which records it takes, what is asked of whom, and what is kept.

What `load` gives of a record are the arguments of the component, in their order; what `keep` gives is the row.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from PIL.Image import Image

from rpo.curation.curate_config import CurateConfig, DecideConfig
from rpo.curation.decide import outcomes_across, outcomes_of, outcomes_of_siblings
from rpo.curation.duplicates import look_of
from rpo.curation.faults import in_words
from rpo.curation.pipeline import Stage
from rpo.curation.records import (
    Critic,
    Critique,
    Edit,
    Editor,
    Fault,
    Instructions,
    Instructor,
    Outcome,
    Scores,
    Source,
    history_of,
    result_of,
    source_in,
)
from rpo.curation.score import Scorer, ToScore
from rpo.curation.sources import Planned
from rpo.curation.store.mark import StageName
from rpo.curation.store.shard import Row, Shard


def sources_stage(draw: Callable[[Sequence[Planned]], Sequence[Image]], batch_size: int) -> Stage[Planned, Image]:
    """Draw or read the images that are planned; an item that cannot be read ends the run."""

    def load(shard: Shard, record: str) -> Planned:
        return shard.planned[record]

    def keep(shard: Shard, record: str, item: Planned, image: Image) -> Row:
        return {
            "caption": item.caption,
            "image": shard.save_image(image),
            "order": shard.place_of(record),
            "origin": dict(item.origin),
            "group": item.group or item.id,
            "side": item.side,
            "look": look_of(image),
        }

    return Stage("sources", batch_size, 1, load, draw, keep, is_strict=True)


def critiques_stage(critic: Critic) -> Stage:
    """Ask what is wrong with every image."""

    def load(shard: Shard, record: str) -> tuple[Image, str]:
        return _image(shard, record), _source(shard, record).caption

    def keep(shard: Shard, record: str, asked: object, answer: Critique) -> Row | Fault:
        return _wrong_type(answer, Critique) or {"critique": answer.model_dump(mode="json")}

    return _stage("critiques", "critic", critic, load, keep)


def instructions_stage(instructor: Instructor, *, instruct_sound: bool) -> Stage:
    """Ask what to do about what is wrong; where nothing is, only with `instruct_sound`."""

    def wants(shard: Shard, record: str) -> bool:
        critique = result_of(shard, "critiques", record)
        return isinstance(critique, Critique) and (instruct_sound or not critique.nothing_to_fix)

    def load(shard: Shard, record: str) -> tuple[Image, str, Critique]:
        critique = result_of(shard, "critiques", record)
        return _image(shard, record), _source(shard, record).caption, critique

    def keep(shard: Shard, record: str, asked: object, answer: Instructions) -> Row | Fault:
        return _wrong_type(answer, Instructions) or {"instructions": list(answer.instructions)}

    return _stage("instructions", "instructor", instructor, load, keep, wants)


def edits_stage(editor: Editor, seed: int, edits_per_image: int = 1) -> Stage:
    """Carry out the instructions; an edit of another size than its source is a fault."""

    def wants(shard: Shard, record: str) -> bool:
        told = result_of(shard, "instructions", record)
        return isinstance(told, Instructions) and not told.is_empty

    def load(shard: Shard, record: str) -> tuple[Image, str, int]:
        own_seed = int(hashlib.sha256(f"edit/{seed}/{record}".encode()).hexdigest()[:12], 16)
        return _image(shard, record), result_of(shard, "instructions", record).text, own_seed

    def ask(items: Sequence[tuple[Image, str, int]]) -> Sequence[Any]:
        images, texts, seeds = map(list, zip(*items, strict=True))
        tries = [editor(images, texts, [one + number for one in seeds]) for number in range(edits_per_image)]
        return tries[0] if edits_per_image == 1 else [list(one) for one in zip(*tries, strict=True)]

    def keep(shard: Shard, record: str, asked: tuple[Image, str, int], answer: Any) -> Row | Fault:
        source, _, own_seed = asked
        tries = [one if (fault := _wrong_edit(one, source)) is None else fault for one in _listed(answer)]
        good = [shard.save_image(one) for one in tries if isinstance(one, Image)]
        if not good:
            return tries[0]
        return {"image": good[0], "seed": own_seed} | ({"others": good[1:]} if len(good) > 1 else {})

    who = in_words("editor", editor.identity)
    return Stage("edits", editor.batch_size, editor.concurrency, load, ask, keep, wants, component=who)


def scores_stage(scorer: Scorer, config: CurateConfig) -> Stage[ToScore, Scores]:
    """Score source and edit; where they are ordered with others, also sources that were not edited."""

    def wants(shard: Shard, record: str) -> bool:
        if isinstance(result_of(shard, "edits", record), Edit):
            return True
        is_pair = config.decide.orderings == "all" and bool(_source(shard, record).side)
        return is_pair or config.decide.orderings == "prompt"

    def load(shard: Shard, record: str) -> ToScore:
        known = history_of(shard, record)
        edited = shard.load_image(known.edit.image, known.source.name) if isinstance(known.edit, Edit) else None
        critique = known.critique if isinstance(known.critique, Critique) else None
        others = known.edit.others if isinstance(known.edit, Edit) else ()
        further = tuple(shard.load_image(one, known.source.name) for one in others)
        return ToScore(known.source.caption, _image(shard, record), edited, critique, further)

    def keep(shard: Shard, record: str, asked: ToScore, answer: Scores) -> Row:
        return asdict(answer)

    return Stage("scores", config.score_batch_size, 1, load, scorer, keep, wants, is_strict=True)


def decisions_stage(rules: DecideConfig) -> Stage:
    """Decide what becomes of each record; outcomes across a given pair are written with its first record."""

    def decide(asked: tuple[Shard, str]) -> list[Outcome]:
        shard, record = asked
        own = history_of(shard, record)
        found = outcomes_of(own, rules)
        if rules.orderings != "own" and (members := shard.together_with(record))[0] == record:
            together = [history_of(shard, one) for one in members]
            if rules.orderings == "prompt":
                found += outcomes_of_siblings(together, rules)
            elif len(together) > 1:
                found += outcomes_across(together[0], together[1], rules)
        return found

    def load(shard: Shard, record: str) -> tuple[Shard, str]:
        return shard, record

    def ask(asked: Sequence[tuple[Shard, str]]) -> list[list[Outcome] | Fault]:
        return [decide(one) for one in asked]

    def keep(shard: Shard, record: str, asked: object, answer: Sequence[Outcome]) -> Row:
        return {"outcomes": [asdict(one) for one in answer]}

    return Stage("decisions", 1, 1, load, ask, keep, is_strict=True)


def _stage(
    name: StageName,
    what: str,
    component: Any,
    load: Callable[[Shard, str], tuple],
    keep: Callable[[Shard, str, Any, Any], Row | Fault],
    wants: Callable[[Shard, str], bool] = lambda shard, record: True,
) -> Stage:
    """The stage of a component, which is asked with a list of each of its arguments."""

    def ask(items: Sequence[tuple]) -> Sequence[Any]:
        return component(*map(list, zip(*items, strict=True)))

    who = in_words(what, component.identity)
    return Stage(name, component.batch_size, component.concurrency, load, ask, keep, wants, component=who)


def _source(shard: Shard, record: str) -> Source:
    return source_in(shard, record)


def _image(shard: Shard, record: str) -> Image:
    source = _source(shard, record)
    return shard.load_image(source.image, source.name)


def _listed(answer: object) -> Sequence[Any]:
    return answer if isinstance(answer, list) else [answer]


def _wrong_edit(answer: Any, source: Image) -> Fault | None:
    """The fault of an editor that gave something else than an image like its source; None if it did not."""
    if fault := _wrong_type(answer, Image):
        return fault
    if (answer.size, answer.mode) == (source.size, "RGB"):
        return None
    found, wanted = (f"{one.mode} {one.size[0]}x{one.size[1]}" for one in (answer, source))
    return Fault("invalid", f"the edit is {found}; expected {wanted}, as its source is")


def _wrong_type(answer: object, wanted: type) -> Fault | None:
    """The fault of a component that answered with something else; None if it did not."""
    if isinstance(answer, wanted):
        return None
    if answer is None:
        return Fault("empty", f"the component gave nothing; expected a {wanted.__name__}")
    return Fault("invalid", f"the component gave a {type(answer).__name__}; expected a {wanted.__name__}", str(answer))
