"""The language of edits in the shapes world: what an editor can be told, written and taken apart.

    add a red circle
    remove the blue square                          remove a blue square (one of several)
    change the red circle to blue                   change the red circle to a blue square
    move the red circle above the blue square       ("below", "to the left of", "to the right of")

"the red object" is a piece that is red and of no known shape, such as two circles that have grown together; it can be
removed or changed. Up to two edits are joined by "; ". Every sentence has exactly one form, so taking it apart and
writing it again gives the same text.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from rpo.errors import InputError
from rpo.shapes.prompts import COLORS, RELATIONS, SHAPES, ObjectType, Relation

EditKind = Literal["add", "remove", "change", "move"]

MALFORMED = "object"
"""What stands for the shape of a piece that has none: "red object"."""

JOINT = "; "
MAX_EDITS = 2
"""How many edits the shapes editor has learned to be told at once."""


@dataclass(frozen=True)
class SceneEdit:
    """One change of a scene; take one from `add`, `remove`, `change`, `move` or `parse_edits`."""

    kind: EditKind
    named: ObjectType
    """What is added, removed, changed or moved."""
    is_one_of_several: bool = False
    """Whether there are others like it, so that it is "a red circle" and not "the red circle"."""
    new: ObjectType | None = None
    """What it becomes; only for kind "change"."""
    relation: Relation | None = None
    """Where it goes, seen from `other`; only for kind "move"."""
    other: ObjectType | None = None

    @property
    def text(self) -> str:
        """The sentence."""
        if self.kind == "add":
            return f"add a {self.named}"
        subject = f"{self.kind} {'a' if self.is_one_of_several else 'the'} {self.named}"
        if self.kind == "change" and self.new:
            is_recolored = self.new.shape == self.named.shape
            return f"{subject} to {self.new.color if is_recolored else f'a {self.new}'}"
        return f"{subject} {self.relation} the {self.other}" if self.kind == "move" else subject


def add(named: ObjectType) -> SceneEdit:
    """One more object of the world."""
    _check(named)
    return SceneEdit("add", named)


def remove(named: ObjectType, *, is_one_of_several: bool = False) -> SceneEdit:
    """One object less."""
    _check(named, may_be_malformed=True)
    return SceneEdit("remove", named, is_one_of_several)


def change(named: ObjectType, new: ObjectType, *, is_one_of_several: bool = False) -> SceneEdit:
    """Another colour, another shape or both, at the same place.

    Returns:
        "change the red circle to blue" if only the colour changes, otherwise "change the red circle to a red square".
    """
    _check(named, may_be_malformed=True)
    _check(new)
    if named == new:
        raise InputError(f"a {named} was to become a {new}, which it is; name another colour or shape")
    return SceneEdit("change", named, is_one_of_several, new=new)


def move(named: ObjectType, relation: Relation, other: ObjectType, *, is_one_of_several: bool = False) -> SceneEdit:
    """The same object at another place.

    Args:
        other: What stays; of another colour or shape, and the only one of its kind in the scene.
    """
    _check(named)
    _check(other)
    if relation not in RELATIONS:
        raise InputError(f"relation {relation!r} does not exist; use one of {', '.join(RELATIONS)}")
    if named == other:
        raise InputError(f"a {named} cannot be moved {relation} another {other}: the sentence would name neither")
    return SceneEdit("move", named, is_one_of_several, relation=relation, other=other)


def join_edits(edits: Sequence[SceneEdit]) -> str:
    """The sentence for several edits: "add a red circle; remove the blue square"."""
    return JOINT.join(edit.text for edit in edits)


def parse_edits(text: str) -> tuple[SceneEdit, ...]:
    """Take an instruction apart; the exact inverse of `join_edits`.

    Args:
        text: One sentence of this language, or several joined by "; ".
    """
    return tuple(_parse_one(sentence, text) for sentence in text.split(JOINT))


def edit_words() -> set[str]:
    """Every word of the language, which a tokenizer shall know whole."""
    fixed = set(re.findall(r"[a-z]+", "add remove change move the a to object " + " ".join(RELATIONS)))
    return {*fixed, *COLORS, *SHAPES, JOINT.strip()}


_NOUN = f"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
_SUBJECT = f"(the|a) ({'|'.join(COLORS)}) ({'|'.join((*SHAPES, MALFORMED))})"
_ADD = re.compile(f"add a {_NOUN}")
_REMOVE = re.compile(f"remove {_SUBJECT}")
_RECOLOR = re.compile(f"change {_SUBJECT} to ({'|'.join(COLORS)})")
_CHANGE = re.compile(f"change {_SUBJECT} to a {_NOUN}")
_MOVE = re.compile(f"move {_SUBJECT} ({'|'.join(RELATIONS)}) the {_NOUN}")


def _parse_one(sentence: str, text: str) -> SceneEdit:
    edit = _matched(sentence)
    if edit is None or edit.text != sentence:
        raise InputError(
            f"instruction {text!r} has the part {sentence!r}, which is no sentence of the shapes editor; it knows 'add "
            "a red circle', 'remove the blue square', 'change the red circle to blue', 'change the red circle to a "
            "blue square', 'move the red circle above the blue square', and two of them joined by '; '"
        )
    return edit


def _matched(sentence: str) -> SceneEdit | None:
    if found := _ADD.fullmatch(sentence):
        return SceneEdit("add", ObjectType(*found.groups()))
    if found := _REMOVE.fullmatch(sentence):
        article, *noun = found.groups()
        return SceneEdit("remove", ObjectType(*noun), article == "a")
    if found := _RECOLOR.fullmatch(sentence):
        article, color, shape, new_color = found.groups()
        named, new = ObjectType(color, shape), ObjectType(new_color, shape)
        return None if shape == MALFORMED or named == new else SceneEdit("change", named, article == "a", new=new)
    if found := _CHANGE.fullmatch(sentence):
        article, color, shape, new_color, new_shape = found.groups()
        return SceneEdit("change", ObjectType(color, shape), article == "a", new=ObjectType(new_color, new_shape))
    if found := _MOVE.fullmatch(sentence):
        article, color, shape, relation, *noun = found.groups()
        named, other = ObjectType(color, shape), ObjectType(*noun)
        is_sound = named != other and shape != MALFORMED
        return SceneEdit("move", named, article == "a", relation=relation, other=other) if is_sound else None  # pyright: ignore[reportArgumentType]
    return None


_TYPES = frozenset(ObjectType(color, shape) for color, shape in product(COLORS, SHAPES))


def _check(named: ObjectType, *, may_be_malformed: bool = False) -> None:
    is_malformed = may_be_malformed and named.shape == MALFORMED and named.color in COLORS
    if named not in _TYPES and not is_malformed:
        raise InputError(
            f"there is no {named} in the shapes world; give one of the colours {', '.join(COLORS)} and one of the "
            f"shapes {', '.join((*SHAPES, MALFORMED) if may_be_malformed else SHAPES)}"
        )
