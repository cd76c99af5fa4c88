"""The shapes world: 64x64 scenes of one to three flat objects that do what their prompt says.

A prompt fixes which objects there are and, for a relation, how they lie; everything else (position, size, background
tint) is drawn at random. Coordinates are pixel indices: x to the right, y down, pixel (0, 0) is centred on the origin.
An object's position is its centre of mass and its radius sets its size; all objects are upright and filled.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from rpo.shapes.prompts import (
    COLORS,
    KINDS,
    SHAPES,
    ObjectType,
    Prompt,
    PromptKind,
    Relation,
    Split,
    parse_prompt,
    prompts,
    sample_prompts,
)

__all__ = [
    "COLORS",
    "DIRECTIONS",
    "IMAGE_SIZE",
    "KINDS",
    "SHAPES",
    "ObjectType",
    "Prompt",
    "PromptKind",
    "Relation",
    "Scene",
    "SceneObject",
    "Split",
    "draw_scene",
    "inside",
    "parse_prompt",
    "prompts",
    "render",
    "sample_prompts",
    "training_scenes",
]

IMAGE_SIZE = 64

DIRECTIONS: dict[Relation, tuple[int, int]] = {
    "above": (0, -1),
    "below": (0, 1),
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
}
"""Unit step (x, y) from the second object of a relation to the first."""

SQUARE_HALF_SIDE = 0.87
TRIANGLE_SIDE = 2.4
TRIANGLE_HEIGHT = TRIANGLE_SIDE * math.sqrt(3) / 2
"""Sizes for radius 1: a square and an equilateral triangle that look about as big as the circle."""

UNIT_AREA = {"circle": math.pi, "square": (2 * SQUARE_HALF_SIDE) ** 2, "triangle": TRIANGLE_SIDE * TRIANGLE_HEIGHT / 2}
"""Area of each shape for radius 1."""

REACH = {"circle": 1.0, "square": SQUARE_HALF_SIDE * math.sqrt(2), "triangle": TRIANGLE_HEIGHT * 2 / 3}
"""Distance from the centre to the farthest point, for radius 1."""

RADII = {1: (7.5, 11.0), 2: (7.5, 10.0), 3: (7.0, 8.5)}
"""Smallest and largest radius by number of objects: two latent cells wide at least, and three always fit."""

RADIUS_STEP = 0.5
"""Whole positions and half-pixel radii keep the set of masks small, so that each is drawn once and then cached."""

MIN_GAP = 3
"""Pixels between two objects: they stay apart after the blur of an autoencoder."""

EDGE_MARGIN = 1
"""Pixels between an object and the edge of the image."""

MIN_SEPARATION = 14
"""Pixels between the centres of a relation, along its axis."""

MAX_SLANT = 0.8
"""Largest offset across the axis of a relation, as a share of the separation along it: nobody disputes "above"."""

BACKGROUND_RANGE = (236, 248)
"""Range of each background channel: always light, never quite the same."""

KIND_WEIGHTS: dict[PromptKind, float] = {"single": 1.0, "count": 1.3, "conjunction": 1.3, "relation": 1.4}
"""Shares of the pretraining set. Every kind teaches single objects too, and relations have the most to tell apart."""

SUPERSAMPLING = 8
LAYOUTS_PER_TRY = 64


@dataclass(frozen=True)
class SceneObject:
    """One object: what it is, where its centre of mass lies and how big it is, in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """Everything that determines an image; later objects are painted over earlier ones."""

    objects: tuple[SceneObject, ...]
    background: tuple[int, int, int] = (242, 242, 242)


def inside(shape: str, radius: float, dx: NDArray[np.floating], dy: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Which points belong to a shape, given their offsets from its centre of mass."""
    return _INSIDE_UNIT[shape](dx / radius, dy / radius)


def _inside_triangle(dx: NDArray[np.floating], dy: NDArray[np.floating]) -> NDArray[np.bool_]:
    below_tip = dy + TRIANGLE_HEIGHT * 2 / 3
    return (below_tip <= TRIANGLE_HEIGHT) & (np.abs(dx) <= below_tip * (TRIANGLE_SIDE / 2 / TRIANGLE_HEIGHT))


_INSIDE_UNIT: dict[str, Callable[[NDArray[np.floating], NDArray[np.floating]], NDArray[np.bool_]]] = {
    "circle": lambda dx, dy: dx**2 + dy**2 <= 1,
    "square": lambda dx, dy: np.maximum(np.abs(dx), np.abs(dy)) <= SQUARE_HALF_SIDE,
    "triangle": _inside_triangle,
}


def render(scene: Scene) -> NDArray[np.uint8]:
    """Paint a scene with anti-aliased edges; returns [64, 64, 3]. What lies outside the image is cut off."""
    canvas = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    canvas[:] = scene.background
    for item in scene.objects:
        _paint(canvas, item)
    return np.rint(canvas).astype(np.uint8)


def _paint(canvas: NDArray[np.float32], item: SceneObject) -> None:
    column, row = math.floor(item.x), math.floor(item.y)
    coverage = _coverage(item.shape, item.radius, item.x - column, item.y - row)
    half = coverage.shape[0] // 2
    left, top = max(column - half, 0), max(row - half, 0)
    right, bottom = min(column + half + 1, IMAGE_SIZE), min(row + half + 1, IMAGE_SIZE)
    if left >= right or top >= bottom:
        return
    shift_x, shift_y = half - column, half - row
    visible = coverage[top + shift_y : bottom + shift_y, left + shift_x : right + shift_x, None]
    patch = canvas[top:bottom, left:right]
    patch += visible * (np.asarray(COLORS[item.color], np.float32) - patch)


@lru_cache(maxsize=1024)
def _coverage(shape: str, radius: float, x: float, y: float) -> NDArray[np.float32]:
    """Share of each pixel that the shape covers; the centre lies at (x, y) from the middle pixel of a square patch."""
    half = math.ceil(REACH[shape] * radius) + 1
    fine = np.arange((2 * half + 1) * SUPERSAMPLING, dtype=np.float64)
    fine = (fine + 0.5) / SUPERSAMPLING - 0.5 - half
    covered = inside(shape, radius, fine[None, :] - x, fine[:, None] - y)
    blocks = covered.reshape(2 * half + 1, SUPERSAMPLING, 2 * half + 1, SUPERSAMPLING)
    return blocks.mean(axis=(1, 3), dtype=np.float32)


def draw_scene(prompt: Prompt, rng: np.random.Generator) -> Scene:
    """Draw a random scene that the prompt describes and that shows nothing else."""
    wanted = prompt.wanted
    while True:
        radii = _draw_radii(len(wanted), rng)
        reach = radii * [REACH[named.shape] for named in wanted]
        margin = np.ceil(reach).astype(int) + EDGE_MARGIN
        layouts = rng.integers(margin[:, None], IMAGE_SIZE - margin[:, None], (LAYOUTS_PER_TRY, len(wanted), 2))
        fits = _keeps_apart(layouts, reach) & _respects(prompt.relation, layouts)
        if fits.any():
            break
    centers = layouts[fits.argmax()]
    low, high = BACKGROUND_RANGE
    red, green, blue = rng.integers(low, high + 1, 3).tolist()
    objects = tuple(
        SceneObject(named.shape, named.color, int(x), int(y), float(radius))
        for named, (x, y), radius in zip(wanted, centers, radii, strict=True)
    )
    return Scene(objects, (red, green, blue))


def _draw_radii(count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    smallest, largest = RADII[count]
    steps = rng.integers(0, round((largest - smallest) / RADIUS_STEP) + 1, count)
    return smallest + RADIUS_STEP * steps.astype(np.float64)


def _keeps_apart(layouts: NDArray[np.int64], reach: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which layouts keep the gap between every two objects, each taken as the circle around it."""
    distance = np.linalg.norm(layouts[:, :, None] - layouts[:, None], axis=-1)
    needed = reach[:, None] + reach + MIN_GAP
    np.fill_diagonal(needed, 0)
    return (distance >= needed).all(axis=(1, 2))


def _respects(relation: Relation | None, layouts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which layouts put the first object clearly on its side of the second."""
    if relation is None:
        return np.ones(len(layouts), bool)
    offset = layouts[:, 0] - layouts[:, 1]
    direction = np.asarray(DIRECTIONS[relation])
    along = offset @ direction
    across = np.abs(offset @ direction[::-1])
    return (along >= MIN_SEPARATION) & (across <= MAX_SLANT * along)


def training_scenes(seed: int, count: int) -> tuple[NDArray[np.uint8], list[str]]:
    """Draw pretraining data: images [count, 64, 64, 3] and their captions, nothing out of domain among them.

    Args:
        seed: Same seed, same data; a longer draw starts with the shorter one.
    """
    rng = np.random.default_rng(seed)
    known = prompts("train") + prompts("in_domain")
    pools = [[prompt for prompt in known if prompt.kind == kind] for kind in KINDS]
    thresholds = np.cumsum([KIND_WEIGHTS[kind] for kind in KINDS])
    images = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    captions: list[str] = []
    for index in range(count):
        pool = pools[np.searchsorted(thresholds, rng.random() * thresholds[-1], side="right")]
        prompt = pool[rng.integers(len(pool))]
        images[index] = render(draw_scene(prompt, rng))
        captions.append(prompt.text)
    return images, captions
