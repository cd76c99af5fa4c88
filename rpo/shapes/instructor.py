"""The instructors of the shapes world: from the critic's words, or from the caption alone, to what its editor learned.

The first acts on what the critique says and not on the caption; the image tells it only whether a thing has others like
it ("remove a red circle" or "remove the red circle"). What is missing is made of what is too much where there is both,
for one change does less harm than two. What the editor's language cannot say (no background, an object of no colour) is
left out.

The other is blind to image and critique: what a critique must be better than. "two red circles" becomes "add a red
circle; add a red circle", and a relation "move the red circle above the blue square": what a person would say who knows
the wish and has not looked.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from PIL.Image import Image

from rpo.curation.curate_config import ChatConfig
from rpo.curation.records import Critique, Fault, Instructions
from rpo.curation.vlm.answers import AnswerCache
from rpo.shapes.critic import pixels_of
from rpo.shapes.edits import MALFORMED, MAX_EDITS, SceneEdit, add, change, move, remove
from rpo.shapes.prompts import COLORS, NUMBER_WORDS, SHAPES, ObjectType, parse_prompt
from rpo.shapes.reader import ReadObject, read_scene

_NUMBERS = {"none": 0, "one": 1, **{word: number for number, word in NUMBER_WORDS.items()}}
_NOUN = rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)}|object of no known shape)"
_MISSING = re.compile(rf"missing: a {_NOUN}")
_EXTRA = re.compile(rf"extra object: a {_NOUN}")
_WRONG = re.compile(rf"wrong (?:colour|shape): a {_NOUN} wanted, a {_NOUN} seen")
_COUNT = re.compile(rf"({'|'.join(NUMBER_WORDS.values())}) {_NOUN}s wanted, (\w+) seen")
_RELATION = re.compile(r"wrong relation: .*")
_UNSAYABLE = re.compile(r"unreadable: .*|.*strangely coloured .*")


@dataclass
class _Wishes:
    """What a critique asks for, sentence by sentence."""

    missing: list[ObjectType] = field(default_factory=list)
    extra: list[ObjectType] = field(default_factory=list)
    wrong: list[tuple[ObjectType, ObjectType]] = field(default_factory=list)
    """What is seen and what it should be."""
    is_misplaced: bool = False


class ShapesInstructor:
    """Writes instructions for the shapes editor."""

    identity: Mapping[str, str] = MappingProxyType({"kind": "shapes"})
    batch_size: int = 16
    concurrency: int = 1

    def __call__(
        self, images: Sequence[Image], captions: Sequence[str], critiques: Sequence[Critique]
    ) -> list[Instructions | Fault]:
        """Instructions for each image: none where nothing is to be fixed or nothing can be said.

        Args:
            critiques: In the words of the shapes critic; one in other words is a fault.
        """
        return [_instruct(*one) for one in zip(images, captions, critiques, strict=True)]


def shapes_instructor(config: ChatConfig, answers: AnswerCache) -> ShapesInstructor:
    """The instructor of the shapes world, which has nothing to set and nothing to keep."""
    return ShapesInstructor()


class ShapesCaptionInstructor:
    """Writes instructions for the shapes editor without looking."""

    identity: Mapping[str, str] = MappingProxyType({"kind": "shapes-caption"})
    batch_size: int = 16
    concurrency: int = 1

    def __call__(
        self, images: Sequence[Image], captions: Sequence[str], critiques: Sequence[Critique]
    ) -> list[Instructions]:
        """Instructions for each image."""
        return [Instructions(instructions=_blindly(caption)) for caption in captions]


def shapes_caption_instructor(config: ChatConfig, answers: AnswerCache) -> ShapesCaptionInstructor:
    """The blind instructor, which has nothing to set and nothing to keep."""
    return ShapesCaptionInstructor()


def _blindly(caption: str) -> tuple[str, ...]:
    prompt = parse_prompt(caption)
    if prompt.relation:
        first, second = prompt.objects
        return (move(first, prompt.relation, second).text,)
    return tuple(add(named).text for named in prompt.wanted[:MAX_EDITS])


def _instruct(image: Image, caption: str, critique: Critique) -> Instructions | Fault:
    wishes = _Wishes()
    for problem in critique.problems:
        if not _understand(problem.what, wishes):
            message = f"the shapes instructor does not understand {problem.what!r}; use the shapes critic"
            return Fault("invalid", message, raw=problem.what)
    seen = Counter(named for item in read_scene(pixels_of(image)).objects if (named := _type_of(item)))
    edits = _compatible(_edits(wishes, caption, seen))
    return Instructions(instructions=tuple(edit.text for edit in edits))


def _understand(what: str, wishes: _Wishes) -> bool:
    """Take one sentence of the critic apart; whether it is one."""
    if found := _MISSING.fullmatch(what):
        wishes.missing.append(_named(*found.groups()))
    elif found := _EXTRA.fullmatch(what):
        wishes.extra.append(_named(*found.groups()))
    elif found := _WRONG.fullmatch(what):
        color, shape, seen_color, seen_shape = found.groups()
        wishes.wrong.append((_named(seen_color, seen_shape), _named(color, shape)))
    elif found := _COUNT.fullmatch(what):
        wanted, color, shape, seen = found.groups()
        lacking = _NUMBERS[wanted] - (_NUMBERS[seen] if seen in _NUMBERS else int(seen))
        pile = wishes.missing if lacking > 0 else wishes.extra
        pile += [_named(color, shape)] * abs(lacking)
    elif _RELATION.fullmatch(what):
        wishes.is_misplaced = True
    else:
        return bool(_UNSAYABLE.fullmatch(what))
    return True


def _edits(wishes: _Wishes, caption: str, seen: Counter[ObjectType]) -> list[SceneEdit]:
    """One edit per wish, in the order of what matters most."""
    missing, extra = list(wishes.missing), list(wishes.extra)
    changes = list(wishes.wrong)
    for _, wanted in wishes.wrong:  # a count tells too few of a kind, and its misfits tell it once more
        if wanted in missing:
            missing.remove(wanted)
    while missing and extra:
        changes.append((extra.pop(0), missing.pop(0)))
    edits = [change(old, new, is_one_of_several=seen[old] > 1) for old, new in changes]
    edits += [add(named) for named in missing]
    edits += [remove(named, is_one_of_several=seen[named] > 1) for named in extra]
    if wishes.is_misplaced:
        prompt = parse_prompt(caption)
        first, second = prompt.objects
        assert prompt.relation is not None
        edits.append(move(first, prompt.relation, second, is_one_of_several=seen[first] > 1))
    return edits


def _compatible(edits: list[SceneEdit]) -> list[SceneEdit]:
    """As many of the first as the editor can be told at once: different things, or the same thing added twice."""
    chosen: list[SceneEdit] = []
    for edit in edits:
        is_added_twice = edit.kind == "add" and edit in chosen
        touched = {named for one in chosen for named in _types(one)}
        if len(chosen) < MAX_EDITS and (is_added_twice or touched.isdisjoint(_types(edit))):
            chosen.append(edit)
    return chosen


def _types(edit: SceneEdit) -> set[ObjectType]:
    return {named for named in (edit.named, edit.new, edit.other) if named}


def _named(color: str, shape: str) -> ObjectType:
    return ObjectType(color, shape if shape in SHAPES else MALFORMED)


def _type_of(item: ReadObject) -> ObjectType | None:
    return ObjectType(item.color, item.shape or MALFORMED) if item.color else None
