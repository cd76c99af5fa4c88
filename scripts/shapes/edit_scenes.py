"""Scenes to be edited: what the base model may draw, not only what a prompt asks for.

Zero to four things, alike or not, now and then touching; among them pieces of no known shape, which are two shapes of
one colour that have run together. Where a thing may go is asked here, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from rpo.shapes.edits import MALFORMED
from rpo.shapes.prompts import COLORS, SHAPES, ObjectType
from rpo.shapes.reader import read_scene
from rpo.shapes.world import EDGE_MARGIN, IMAGE_SIZE, MIN_GAP, RADIUS_STEP, REACH, Scene, SceneObject, render

MAX_THINGS = 4
COUNT_WEIGHTS = (0.03, 0.27, 0.40, 0.22, 0.08)
"""Shares of scenes with 0, 1, 2, 3 and 4 things."""

RADII = {0: (7.5, 11.0), 1: (7.5, 11.0), 2: (7.5, 10.0), 3: (7.0, 8.5), 4: (6.5, 8.0)}
"""Smallest and largest radius by number of things; for up to three those of the world."""

ALIKE_SHARE = 0.35
"""Share of scenes whose things are all alike, as for a counting prompt."""

MALFORMED_SHARE = 0.1
"""Probability of each thing to be of no known shape."""

CLOSE_SHARE = 0.15
"""Share of scenes whose objects of different colours may touch, and cover each other a little."""

MALFORMED_SHAPES = 400
"""How many different ones there are."""

CLOSEST_GAP = -3
TRIES = 64


@dataclass(frozen=True)
class Thing:
    """What a noun phrase can name: one object, or two of one colour that have run together."""

    named: ObjectType
    parts: tuple[SceneObject, ...]

    @property
    def is_malformed(self) -> bool:
        """Whether it has no shape that could be named."""
        return self.named.shape == MALFORMED


def scene_of(things: Sequence[Thing], background: tuple[int, int, int]) -> Scene:
    """The things painted one over the other."""
    return Scene(tuple(part for thing in things for part in thing.parts), background)


def thing_at(named: ObjectType, place: NDArray[np.integer], radius: float) -> Thing:
    """One sound object at (x, y)."""
    x, y = place.tolist()
    return Thing(named, (SceneObject(named.shape, named.color, x, y, radius),))


def draw_things(rng: np.random.Generator, *, needs_malformed: bool = False) -> list[Thing]:
    """Draw what a scene shows.

    Args:
        needs_malformed: Whether one thing at least shall be of no known shape.
    """
    while True:
        count = int(rng.choice(len(COUNT_WEIGHTS), p=COUNT_WEIGHTS))
        is_malformed = rng.random(count) < MALFORMED_SHARE
        if needs_malformed and count:
            is_malformed[rng.integers(count)] = True
        types = [draw_type(rng)] * count if rng.random() < ALIKE_SHARE else [draw_type(rng) for _ in range(count)]
        is_close = rng.random() < CLOSE_SHARE
        things: list[Thing] = []
        for named, lacks_shape in zip(types, is_malformed, strict=True):
            radius = draw_radius(count, rng)
            thing = _malformed(named.color, rng) if lacks_shape else thing_at(named, np.zeros(2, int), radius)
            placed = _placed(thing, things, is_close, rng)
            things += [placed] if placed else []
        if len(things) == count and (is_malformed.any() or not needs_malformed):
            return things


def draw_type(rng: np.random.Generator) -> ObjectType:
    """Any colour with any shape."""
    return ObjectType(list(COLORS)[rng.integers(len(COLORS))], SHAPES[rng.integers(len(SHAPES))])


def draw_radius(count: int, rng: np.random.Generator) -> float:
    """A radius as usual among `count` things."""
    low, high = RADII[min(count, MAX_THINGS)]
    return low + RADIUS_STEP * int(rng.integers(round((high - low) / RADIUS_STEP) + 1))


def limits(shape: str, radius: float) -> tuple[int, int]:
    """Where the centre of an object may lie on each axis: from the first up to before the second."""
    margin = int(np.ceil(REACH[shape] * radius)) + EDGE_MARGIN
    return margin, IMAGE_SIZE - margin


def is_free(
    places: NDArray[np.integer], shape: str, radius: float, others: Sequence[Thing], *, gap: float = MIN_GAP
) -> NDArray[np.bool_]:
    """At which of the places an object would keep its distance from every other, each taken as the circle around it."""
    free = np.ones(len(places), bool)
    for part in (part for thing in others for part in thing.parts):
        distance = np.hypot(places[:, 0] - part.x, places[:, 1] - part.y)
        free &= distance >= REACH[shape] * radius + REACH[part.shape] * part.radius + gap
    return free


def _placed(thing: Thing, others: Sequence[Thing], is_close: bool, rng: np.random.Generator) -> Thing | None:
    """The thing, moved from the origin to a random free place; None if none was found."""
    low = max(limits(part.shape, part.radius)[0] - min(part.x, part.y) for part in thing.parts)
    high = min(limits(part.shape, part.radius)[1] - max(part.x, part.y) for part in thing.parts)
    places = rng.integers(int(low), int(high), (TRIES, 2))
    free = np.ones(len(places), bool)
    for part in thing.parts:
        at = places + np.array([part.x, part.y], int)
        for other in others:
            may_touch = is_close and other.named.color != thing.named.color
            free &= is_free(at, part.shape, part.radius, [other], gap=CLOSEST_GAP if may_touch else MIN_GAP)
    if not free.any():
        return None
    x, y = places[free.argmax()].tolist()
    parts = (SceneObject(part.shape, part.color, part.x + x, part.y + y, part.radius) for part in thing.parts)
    return Thing(thing.named, tuple(parts))


def _malformed(color: str, rng: np.random.Generator) -> Thing:
    """Two shapes of one colour around the origin that together are read as an object of no known shape."""
    pool = _malformed_shapes()
    parts = (replace(part, color=color) for part in pool[rng.integers(len(pool))])
    return Thing(ObjectType(color, MALFORMED), tuple(parts))


@cache
def _malformed_shapes() -> list[tuple[SceneObject, SceneObject]]:
    """Pairs of overlapping shapes that the reader takes for one piece and cannot name; their colour plays no part."""
    rng = np.random.default_rng(0)
    pool: list[tuple[SceneObject, SceneObject]] = []
    while len(pool) < MALFORMED_SHAPES:
        one, other = (SHAPES[index] for index in rng.integers(len(SHAPES), size=2))
        radius, reach = draw_radius(int(rng.integers(1, 4)), rng), int(rng.integers(0, 15))
        x, y = rng.integers(-reach, reach + 1, 2).tolist()
        parts = (SceneObject(one, "red", 32, 32, radius), SceneObject(other, "red", 32 + x, 32 + y, radius))
        seen = read_scene(render(Scene(parts))).objects
        if len(seen) == 1 and seen[0].color and not seen[0].shape:
            first, second = (replace(part, x=part.x - 32, y=part.y - 32) for part in parts)
            pool.append((first, second))
    return pool
