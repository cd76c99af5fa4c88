"""Scenes for the proxy reward: families of one layout whose members differ by one edit, and every caption that holds.

A family is a scene of some prompt and near misses of it: the same layout with one object recoloured, reshaped, taken
away, added, moved, or two that changed places. So the captions of a family are each other's hard negatives, and so are
its images. Some near misses show what no sentence of the world says ("a red circle and two blue squares"); they have no
caption and serve as wrong images only. Which captions hold is the verifier's rule applied to the true objects.

Nothing out of domain occurs: neither a held-out combination nor a held-out pairing, in scenes and captions alike.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from rpo.shapes.prompts import COLORS, KINDS, SHAPES, ObjectType, Prompt, prompts
from rpo.shapes.reader import ReadObject, ReadScene
from rpo.shapes.verifier import judge
from rpo.shapes.world import (
    EDGE_MARGIN,
    IMAGE_SIZE,
    KIND_WEIGHTS,
    MIN_GAP,
    REACH,
    UNIT_AREA,
    Scene,
    SceneObject,
    draw_scene,
    render,
)

FAMILY_SIZE = 4
"""Scenes of a family: one of its prompt and three near misses."""

MAX_OBJECTS = 3
STRANGER_SHARE = 0.5
"""Share of added objects of any type; the others look like one that is there, which only counting tells."""

TRIES = 40
"""Attempts at one edit before another is tried: not every layout has room for one more object."""


@dataclass(frozen=True)
class Families:
    """Rendered families, one after another: `FAMILY_SIZE` images each, the first of which shows the family's prompt."""

    images: NDArray[np.uint8]
    """[count * FAMILY_SIZE, 64, 64, 3]"""
    prompts: list[Prompt]
    """The prompt of each family."""
    captions: list[list[str]]
    """Every sentence that holds of each image; none for some near misses."""


def draw_families(seed: int, count: int) -> Families:
    """Draw and render families.

    Args:
        seed: Same seed, same families; a longer draw starts with the shorter one.
    """
    rng = np.random.default_rng(seed)
    known = known_prompts()
    pools = [[prompt for prompt in known if prompt.kind == kind] for kind in KINDS]
    weights = np.array([KIND_WEIGHTS[kind] for kind in KINDS])
    images = np.empty((count * FAMILY_SIZE, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    wanted: list[Prompt] = []
    captions: list[list[str]] = []
    for family in range(count):
        pool = pools[rng.choice(len(pools), p=weights / weights.sum())]
        wanted.append(pool[rng.integers(len(pool))])
        scenes = draw_family(wanted[-1], rng)
        for member, scene in enumerate(scenes):
            images[family * FAMILY_SIZE + member] = render(scene)
            captions.append(true_captions(scene))
    return Families(images, wanted, captions)


def known_prompts() -> list[Prompt]:
    """What the base was pretrained on, and the proxy is too: everything but what is out of domain."""
    return prompts("train") + prompts("in_domain")


def draw_family(prompt: Prompt, rng: np.random.Generator) -> list[Scene]:
    """A scene of `prompt`, then near misses of it, of which the prompt does not hold."""
    first = draw_scene(prompt, rng)
    family = [first]
    while len(family) < FAMILY_SIZE:
        edit = EDITS[rng.integers(len(EDITS))]
        scene = _first_sound(edit, first, rng)
        if scene is not None and prompt.text not in true_captions(scene):
            family.append(scene)
    return family


def true_captions(scene: Scene) -> list[str]:
    """Every known sentence that the verifier's rule finds true of the scene's own objects."""
    objects = [
        ReadObject(item.color, item.shape, item.x, item.y, UNIT_AREA[item.shape] * item.radius**2)
        for item in scene.objects
    ]
    candidates = _prompts_by_objects().get(_key(_types(scene)), ())
    return [prompt.text for prompt in candidates if judge(ReadScene(tuple(objects), True), prompt).holds]


def _first_sound(
    edit: Callable[[Scene, np.random.Generator], list[SceneObject]], scene: Scene, rng: np.random.Generator
) -> Scene | None:
    """The first try of `edit` that changes something and gives a scene of this world; None after too many tries."""
    for _ in range(TRIES):
        objects = tuple(edit(scene, rng))
        if objects != scene.objects and _is_known(objects) and _keeps_apart(objects):
            return Scene(objects, scene.background)
    return None


def _recolored(scene: Scene, rng: np.random.Generator) -> list[SceneObject]:
    return _with_one_changed(scene, rng, color=list(COLORS)[rng.integers(len(COLORS))])


def _reshaped(scene: Scene, rng: np.random.Generator) -> list[SceneObject]:
    return _with_one_changed(scene, rng, shape=SHAPES[rng.integers(len(SHAPES))])


def _moved(scene: Scene, rng: np.random.Generator) -> list[SceneObject]:
    x, y = rng.integers(0, IMAGE_SIZE, 2).tolist()
    return _with_one_changed(scene, rng, x=x, y=y)


def _with_one_changed(scene: Scene, rng: np.random.Generator, **changes: str | float) -> list[SceneObject]:
    objects = list(scene.objects)
    index = rng.integers(len(objects))
    objects[index] = dataclasses.replace(objects[index], **changes)
    return objects


def _with_one_taken(scene: Scene, rng: np.random.Generator) -> list[SceneObject]:
    index = rng.integers(len(scene.objects))
    return [item for other, item in enumerate(scene.objects) if other != index]


def _with_one_added(scene: Scene, rng: np.random.Generator) -> list[SceneObject]:
    """One object more, as large as another."""
    model = scene.objects[rng.integers(len(scene.objects))]
    x, y = rng.integers(0, IMAGE_SIZE, 2).tolist()
    color, shape = model.color, model.shape
    if rng.random() < STRANGER_SHARE:
        color, shape = list(COLORS)[rng.integers(len(COLORS))], SHAPES[rng.integers(len(SHAPES))]
    return [*scene.objects, SceneObject(shape, color, x, y, model.radius)]


def _with_two_swapped(scene: Scene, rng: np.random.Generator) -> list[SceneObject]:
    objects = list(scene.objects)
    if len(objects) > 1:
        first, second = rng.permutation(len(objects))[:2]
        one, other = objects[first], objects[second]
        objects[first] = dataclasses.replace(one, x=other.x, y=other.y)
        objects[second] = dataclasses.replace(other, x=one.x, y=one.y)
    return objects


EDITS = (_recolored, _reshaped, _moved, _with_one_taken, _with_one_added, _with_two_swapped)


def _keeps_apart(objects: Sequence[SceneObject]) -> bool:
    """Whether there are few enough objects, each inside the image and apart from the others."""
    if not 0 < len(objects) <= MAX_OBJECTS:
        return False
    reach = [REACH[item.shape] * item.radius for item in objects]
    margins = [EDGE_MARGIN + np.ceil(one) for one in reach]
    is_inside = all(
        margin <= item.x < IMAGE_SIZE - margin and margin <= item.y < IMAGE_SIZE - margin
        for item, margin in zip(objects, margins, strict=True)
    )
    return is_inside and all(
        np.hypot(objects[first].x - objects[second].x, objects[first].y - objects[second].y)
        >= reach[first] + reach[second] + MIN_GAP
        for first in range(len(objects))
        for second in range(first)
    )


def _is_known(objects: Sequence[SceneObject]) -> bool:
    """Whether no combination and no pairing among the objects is out of domain."""
    types = sorted({ObjectType(item.color, item.shape) for item in objects})
    groups = _prompts_by_objects()
    alone = all((one,) in groups for one in types)
    return alone and all((types[low], types[high]) in groups for high in range(len(types)) for low in range(high))


def _types(scene: Scene) -> list[ObjectType]:
    return [ObjectType(item.color, item.shape) for item in scene.objects]


def _key(types: Sequence[ObjectType]) -> tuple[ObjectType, ...]:
    return tuple(sorted(types))


@cache
def _prompts_by_objects() -> dict[tuple[ObjectType, ...], tuple[Prompt, ...]]:
    """The known prompts that want exactly these objects."""
    groups: dict[tuple[ObjectType, ...], tuple[Prompt, ...]] = {}
    for prompt in known_prompts():
        key = _key(prompt.wanted)
        groups[key] = (*groups.get(key, ()), prompt)
    return groups
