"""Say whether an edit was carried out and everything else left as it was, by what the reader sees in both images.

Each sentence of the instruction is given a target among the objects of the source, in every way there is; the best
explanation counts. Under it, the objects of the edited image must be those that no sentence names, each where it was,
and those that the sentences ask for: an added one anywhere, a changed one where its target was, a moved one in its
relation. A sentence that was not carried out may account for one object of the edited image that nothing else
explains (its target, still there, or what became of it instead); any further one means that the rest was changed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from rpo.shapes.edits import MALFORMED, EditKind, SceneEdit, parse_edits
from rpo.shapes.prompts import ObjectType, Prompt
from rpo.shapes.reader import ReadObject, ReadScene, read_scene
from rpo.shapes.verifier import judge

POSITION_TOLERANCE = 5.0
"""Pixels by which an object may wander and still be where it was; the autoencoder alone moves one by less than 1."""

AREA_TOLERANCE = 0.35
"""Share by which the area of an object may change; that of a malformed piece is not compared."""


@dataclass(frozen=True)
class EditVerdict:
    """What became of an instruction."""

    is_done: bool
    """Whether every sentence was carried out."""
    is_rest_unchanged: bool
    """Whether everything that no sentence names is as it was, and nothing else has appeared."""
    reason: str
    """What is wrong, or that nothing is."""


def carries_out(source: NDArray[np.uint8], edited: NDArray[np.uint8], instruction: str) -> EditVerdict:
    """Compare two images by the instruction that led from one to the other.

    Args:
        source: Pixels of the image that was edited, uint8 [64, 64, 3].

    Returns:
        The verdict; an instruction that names what the source does not show cannot be done.
    """
    edits = parse_edits(instruction)
    before, after = read_scene(source), read_scene(edited)
    if not after.has_background or not before.has_background:
        return EditVerdict(False, False, f"the {'edited' if before.has_background else 'source'} image is unreadable")
    found = [_explain(edits, targets, before, after) for targets in _targets(edits, before)]
    if not found:
        named = ", ".join(f"a {edit.named}" for edit in edits if edit.kind != "add")
        return EditVerdict(False, False, f"the source does not show what is named: {named}")
    return min(found, key=lambda one: (len(one.undone) + len(one.changed), len(one.undone))).verdict()


@dataclass(frozen=True)
class _Explanation:
    """Under one choice of targets: what was not carried out, and what else has changed."""

    undone: tuple[str, ...]
    changed: tuple[str, ...]

    def verdict(self) -> EditVerdict:
        reason = "; ".join((*self.undone, *self.changed)) or "carried out, and nothing else changed"
        return EditVerdict(not self.undone, not self.changed, reason)


def _targets(edits: Sequence[SceneEdit], before: ReadScene) -> Iterator[tuple[ReadObject | None, ...]]:
    """Every way to give each sentence a target of its own in the source; an added object has none."""
    needing = [edit for edit in edits if edit.kind != "add"]
    possible = [_possible_targets(edit, before) for edit in needing]
    for chosen in permutations(before.objects, len(needing)):
        if all(seen in some for seen, some in zip(chosen, possible, strict=True)):
            left = iter(chosen)
            yield tuple(None if edit.kind == "add" else next(left) for edit in edits)


def _possible_targets(edit: SceneEdit, before: ReadScene) -> list[ReadObject]:
    """What a sentence may mean; one of several to be moved is one that is not yet where it shall go."""
    alike = [seen for seen in before.objects if _is_a(seen, edit.named)]
    return [seen for seen in alike if not _is_in_relation(edit, seen, before)] or alike


def _is_a(seen: ReadObject, named: ObjectType) -> bool:
    return seen.color == named.color and (seen.shape or MALFORMED) == named.shape


def _explain(
    edits: Sequence[SceneEdit], targets: Sequence[ReadObject | None], before: ReadScene, after: ReadScene
) -> _Explanation:
    left = list(after.objects)
    rest = [seen for seen in before.objects if seen not in targets]
    changed = [f"changed: the {seen} is not as it was" for seen in rest if not _take(left, _same_as(seen))]
    undone: list[str] = []
    for edit, target in sorted(zip(edits, targets, strict=True), key=lambda pair: _ORDER.index(pair[0].kind)):
        if not _is_done(edit, target, left, after):
            undone.append(f"not done: {edit.text}")
    changed += [f"new: a {seen}" for seen in left[len(undone) :]]
    return _Explanation(tuple(undone), tuple(changed))


_ORDER: tuple[EditKind, ...] = ("change", "move", "add", "remove")
"""What can be told by its place comes first: an object that is to be gone is looked for among what is left."""


def _is_done(edit: SceneEdit, target: ReadObject | None, left: list[ReadObject], after: ReadScene) -> bool:
    """Whether one sentence was carried out; the object that shows it is taken from `left`."""
    if edit.kind == "add" or target is None:
        return _take(left, lambda seen: _is_a(seen, edit.named))
    if edit.kind == "remove":
        return not any(_distance(seen, target) <= POSITION_TOLERANCE for seen in left)
    if edit.kind == "move":
        return _take(left, lambda seen: _is_a(seen, edit.named) and _is_in_relation(edit, seen, after))
    new = edit.new or edit.named
    return _take(left, lambda seen: _is_a(seen, new) and _distance(seen, target) <= _reach(target))


def _take(left: list[ReadObject], fits: Callable[[ReadObject], bool]) -> bool:
    """Take the first object that fits out of `left`; False if there is none."""
    for index, seen in enumerate(left):
        if fits(seen):
            del left[index]
            return True
    return False


def _same_as(seen: ReadObject) -> Callable[[ReadObject], bool]:
    """Tells whether an object of the edited image is this one of the source."""

    def is_same(other: ReadObject) -> bool:
        is_as_large = seen.shape is None or abs(other.area / seen.area - 1) <= AREA_TOLERANCE
        is_alike = (other.color, other.shape) == (seen.color, seen.shape)
        return is_alike and is_as_large and _distance(seen, other) <= POSITION_TOLERANCE

    return is_same


def _distance(one: ReadObject, other: ReadObject) -> float:
    return math.hypot(one.x - other.x, one.y - other.y)


def _reach(target: ReadObject) -> float:
    """How far off a changed object may be: a piece of no known shape has no centre that would bind."""
    return POSITION_TOLERANCE if target.shape else 2 * POSITION_TOLERANCE


def _is_in_relation(edit: SceneEdit, seen: ReadObject, scene: ReadScene) -> bool:
    if edit.relation is None or edit.other is None:
        return False
    prompt = Prompt("relation", (edit.named, edit.other), relation=edit.relation)
    others = (other for other in scene.objects if _is_a(other, edit.other))
    return any(judge(ReadScene((seen, other), has_background=True), prompt).holds for other in others)
