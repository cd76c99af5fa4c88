"""Training data of the shapes editor: (scene, instruction, edited scene), drawn from the world.

The edited scene is the source with the things that the instruction names taken out, replaced, moved or added, and
everything else the same to the pixel. A moved object goes to the free place nearest to where it was; a changed one
stays where it is.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from rpo.shapes.edits import SceneEdit, add, change, join_edits, move, remove
from rpo.shapes.prompts import COLORS, RELATIONS, SHAPES, ObjectType
from rpo.shapes.world import BACKGROUND_RANGE, DIRECTIONS, RADIUS_STEP, UNIT_AREA, Scene, SceneObject
from scripts.shapes.edit_scenes import (
    MAX_THINGS,
    RADII,
    TRIES,
    Thing,
    draw_radius,
    draw_things,
    draw_type,
    is_free,
    limits,
    scene_of,
    thing_at,
)

EditTask = Literal["add", "remove", "recolor", "reshape", "replace", "repair", "move", "two"]
EDIT_TASKS: tuple[EditTask, ...] = get_args(EditTask)
"""What is practised and counted: a change of colour, of shape, of both, and of a malformed piece are four tasks."""

SINGLE_TASKS = EDIT_TASKS[:-1]

TASK_WEIGHTS: dict[EditTask, float] = {
    "add": 1.4,
    "remove": 1.0,
    "recolor": 0.7,
    "reshape": 0.9,
    "replace": 0.5,
    "repair": 0.9,
    "move": 2.2,
    "two": 1.2,
}
"""Shares of the training set; what has the most to work out comes most often."""

ANOTHER_SHARE = 0.4
"""Share of added objects that are like one in the scene, as for a counting prompt."""

REPAIRED_IN_COLOR_SHARE = 0.8
"""Share of malformed pieces that keep their colour when they get a shape."""

MOVED_SEPARATION, MOVED_SLANT = 15, 0.6
"""Where a moved object goes: a little clearer than in the world's own relations, for an editor is not exact."""

HELD_SEPARATION, HELD_SLANT = 10, 1.0
"""Where the verifier would say that a relation holds already, so that there is nothing to move."""

LARGEST_SHIFT = 3
"""Pixels by which an object that changes its shape may give way to another or to the edge."""

TRIES_PER_SCENE = 8
"""How often another target or place is tried before another scene is drawn."""

HELD_OUT_SHARE = 0.1
"""Share of the sentences of kind change and move that no training sees."""


@dataclass(frozen=True)
class EditTriple:
    """A scene, what the editor is told, and the scene it shall give."""

    task: EditTask
    edits: tuple[SceneEdit, ...]
    source: Scene
    edited: Scene

    @property
    def instruction(self) -> str:
        """The sentence."""
        return join_edits(self.edits)


def is_held_out(edits: Sequence[SceneEdit]) -> bool:
    """Whether an instruction has a sentence that no training sees; the answer depends on the text alone."""
    return any(edit.kind in ("change", "move") and _fraction(edit.text) < HELD_OUT_SHARE for edit in edits)


def _fraction(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def triples(seed: int, *, is_held_out_only: bool = False) -> Iterator[EditTriple]:
    """Draw triples without end.

    Args:
        is_held_out_only: Only instructions with a held-out sentence, instead of only those without.

    Yields:
        One triple after the other, tasks mixed by `TASK_WEIGHTS`.
    """
    rng = np.random.default_rng(seed)
    weights = np.array([TASK_WEIGHTS[task] for task in EDIT_TASKS])
    while True:
        task = EDIT_TASKS[rng.choice(len(EDIT_TASKS), p=weights / weights.sum())]
        triple = draw_triple(task, rng)
        while is_held_out(triple.edits) != is_held_out_only and (task not in ("add", "remove") or not is_held_out_only):
            triple = draw_triple(task, rng)
        yield triple


def draw_triple(task: EditTask, rng: np.random.Generator) -> EditTriple:
    """Draw a scene and an edit of it.

    Returns:
        The triple; its source and its instruction always fit each other.
    """
    while True:
        things = draw_things(rng, needs_malformed=task == "repair")
        do = _two_edits if task == "two" else partial(_one_edit, task)
        if done := next(filter(None, (do(things, rng) for _ in range(TRIES_PER_SCENE))), None):
            edits, edited = done
            low, high = BACKGROUND_RANGE
            red, green, blue = rng.integers(low, high + 1, 3).tolist()
            background = (red, green, blue)
            return EditTriple(task, edits, scene_of(things, background), scene_of(edited, background))


Edited = tuple[tuple[SceneEdit, ...], list[Thing]]


def _one_edit(task: EditTask, things: list[Thing], rng: np.random.Generator) -> Edited | None:
    """Do one task to the things; None if they do not lend themselves to it."""
    match task:
        case "add":
            return _add(things, rng)
        case "move":
            return _move(things, rng)
        case "remove":
            return _remove(things, rng)
        case _:
            return _change(task, things, rng)


def _two_edits(things: list[Thing], rng: np.random.Generator) -> Edited | None:
    """Two different edits, the second of things that the first has not touched."""
    first_task, second_task = (SINGLE_TASKS[index] for index in rng.integers(len(SINGLE_TASKS), size=2))
    first = _one_edit(first_task, things, rng)
    second = _one_edit(second_task, first[1], rng) if first else None
    if first is None or second is None or first_task == second_task == "move":
        return None
    one, other = first[0][0], second[0][0]
    is_added_twice = one == other and one.kind == "add"
    if _types(one) & _types(other) and not is_added_twice:
        return None
    return (one, other), second[1]


def _types(edit: SceneEdit) -> set[ObjectType]:
    return {named for named in (edit.named, edit.new, edit.other) if named}


def _is_one_of_several(things: Sequence[Thing], named: ObjectType) -> bool:
    return sum(thing.named == named for thing in things) > 1


def _replaced(things: list[Thing], index: int, *new: Thing) -> list[Thing]:
    return [*things[:index], *new, *things[index + 1 :]]


def _add(things: list[Thing], rng: np.random.Generator) -> Edited | None:
    if len(things) == MAX_THINGS:
        return None
    sound = [thing.named for thing in things if not thing.is_malformed]
    is_another = bool(sound) and rng.random() < ANOTHER_SHARE
    named = sound[rng.integers(len(sound))] if is_another else draw_type(rng)
    radius = draw_radius(len(things) + 1, rng)
    places = rng.integers(*limits(named.shape, radius), (TRIES, 2))
    free = places[is_free(places, named.shape, radius, things)]
    return ((add(named),), [*things, thing_at(named, free[0], radius)]) if len(free) else None


def _remove(things: list[Thing], rng: np.random.Generator) -> Edited | None:
    if not things:
        return None
    index = int(rng.integers(len(things)))
    named = things[index].named
    return (remove(named, is_one_of_several=_is_one_of_several(things, named)),), _replaced(things, index)


def _move(things: list[Thing], rng: np.random.Generator) -> Edited | None:
    sound = [index for index, thing in enumerate(things) if not thing.is_malformed]
    unique = [index for index in sound if not _is_one_of_several(things, things[index].named)]
    if not unique:
        return None
    other, index = unique[rng.integers(len(unique))], sound[rng.integers(len(sound))]
    relation = RELATIONS[rng.integers(len(RELATIONS))]
    (part,), (fixed,) = things[index].parts, things[other].parts
    named = things[index].named
    step, here = np.asarray(DIRECTIONS[relation]), np.array([part.x, part.y])
    alike = np.array([(one.parts[0].x, one.parts[0].y) for one in things if one.named == named])
    if index == other or _is_beyond(alike, step, fixed, HELD_SEPARATION, HELD_SLANT).any():
        return None
    axis = np.arange(*limits(part.shape, part.radius))
    places = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    places = places[_is_beyond(places, step, fixed, MOVED_SEPARATION, MOVED_SLANT)]
    places = places[is_free(places, part.shape, part.radius, _replaced(things, index))]
    if not len(places):
        return None
    x, y = places[np.square(places - here).sum(axis=1).argmin()].tolist()
    is_one_of_several = _is_one_of_several(things, named)
    edit = move(named, relation, things[other].named, is_one_of_several=is_one_of_several)
    return (edit,), _replaced(things, index, Thing(named, (replace(part, x=x, y=y),)))


def _is_beyond(
    points: NDArray[np.number], step: NDArray[np.integer], fixed: SceneObject, separation: float, slant: float
) -> NDArray[np.bool_]:
    """Which points lie in direction `step` of the fixed object."""
    offset = points - np.array([fixed.x, fixed.y])
    along, across = offset @ step, np.abs(offset @ step[::-1])
    return (along >= separation) & (across <= slant * along)


def _change(task: EditTask, things: list[Thing], rng: np.random.Generator) -> Edited | None:
    fitting = [index for index, thing in enumerate(things) if thing.is_malformed == (task == "repair")]
    if not fitting:
        return None
    index = fitting[rng.integers(len(fitting))]
    named = things[index].named
    new = _new_type(task, named, rng)
    changed = _put_in_place(new, things[index], _replaced(things, index))
    if changed is None:
        return None
    edit = change(named, new, is_one_of_several=_is_one_of_several(things, named))
    return (edit,), _replaced(things, index, changed)


def _new_type(task: EditTask, named: ObjectType, rng: np.random.Generator) -> ObjectType:
    colors = [color for color in COLORS if color != named.color]
    shapes = [shape for shape in SHAPES if shape != named.shape]
    color, shape = colors[rng.integers(len(colors))], shapes[rng.integers(len(shapes))]
    keeps_color = task == "reshape" or (task == "repair" and rng.random() < REPAIRED_IN_COLOR_SHARE)
    return ObjectType(named.color if keeps_color else color, named.shape if task == "recolor" else shape)


def _put_in_place(new: ObjectType, thing: Thing, others: list[Thing]) -> Thing | None:
    """The new object where the old thing is: as large, or a little smaller or shifted if it would not fit."""
    part = thing.parts[0]
    if new.shape == part.shape and not thing.is_malformed:
        return Thing(new, (replace(part, color=new.color),))
    x, y, radius = part.x, part.y, part.radius
    if thing.is_malformed:
        x, y = np.mean([(one.x, one.y) for one in thing.parts], axis=0).tolist()
        area = max(UNIT_AREA[one.shape] * one.radius**2 for one in thing.parts)
        radius = round((area / UNIT_AREA[new.shape]) ** 0.5 / RADIUS_STEP) * RADIUS_STEP
    axis = np.arange(-LARGEST_SHIFT, LARGEST_SHIFT + 1)
    shifts = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    places = np.rint([x, y]).astype(int) + shifts[np.argsort((shifts**2).sum(axis=1), kind="stable")]
    while radius >= RADII[MAX_THINGS][0]:
        low, high = limits(new.shape, radius)
        is_inside = ((places >= low) & (places < high)).all(axis=1)
        fitting = places[is_inside & is_free(places, new.shape, radius, others, gap=1)]
        if len(fitting):
            return thing_at(new, fitting[0], radius)
        radius -= RADIUS_STEP
    return None
