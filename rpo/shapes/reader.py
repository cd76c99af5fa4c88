"""Read a scene out of pixels: which objects it shows, and where.

Every pixel of a clean scene is a mixture b + a (c - b) of the background b and one palette colour c. So a pixel
belongs to the colour whose line from the background it lies closest to, and to an object if its coverage a is at least
one half. The connected pieces of each colour are then named by two tests, each of which may answer "none of these":

- colour: the nearest palette colour to the median of the piece's core, within `MAX_COLOR_DISTANCE`;
- shape: the best overlap with a perfect shape of the same area and centre of mass, at least `MIN_OVERLAP`.

What neither test can name is still an object of the scene: a smear is read as an object of no known shape, not ignored.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from rpo.shapes.world import COLORS, SHAPES, UNIT_AREA, inside

MIN_BACKGROUND_VALUE = 200
"""Darkest channel of a background that still counts as light; the world's own are 236 and more."""

MIN_BACKGROUND_SHARE = 0.65
"""Share of pixels that must look like the background. Three large objects leave 0.8; noise has no background at all."""

BACKGROUND_TOLERANCE = 50
"""RGB distance up to which a pixel looks like the background; beyond it, a person sees a stain."""

MIN_COVERAGE = 0.5
"""Where the edge of a blurred object lies: half object, half background."""

MIN_BLOB_AREA = 16
"""Pixels below which a piece is a speck, left by an autoencoder or by a mixed edge; the smallest object has 122."""

MAX_SPECK_AREA = 48
"""Pixels in all specks together, away from objects, before they are read as one more object: confetti is not clean."""

MAX_COLOR_DISTANCE = 65
"""RGB distance to a palette colour at which a hue stops being it; two palette colours are 169 apart or more."""

MIN_OVERLAP = 0.87
"""Intersection over union with the perfect shape. Rendered objects reach 0.97, after a strong blur still 0.9; a circle
taken for a square has 0.83 and a circle that lacks a quarter 0.84 at most."""

MAX_HOLE_AREA = 4
"""Pixels of another colour enclosed by an object before it counts as malformed."""

RADIUS_RANGE = (6.0, 15.0)
"""Radii at which a shape can be told; the world draws 7 to 11."""

STAIN_CLEARANCE = 2
"""Pixels around an object where its own blurred edge may look like a stain."""

FINENESS = 4
"""Points per pixel and axis at which an outline is compared with the perfect shapes."""

_PALETTE = np.array(list(COLORS.values()), np.float32)
_COLOR_NAMES = tuple(COLORS)


@dataclass(frozen=True)
class ReadObject:
    """One object as seen: `color` or `shape` is None where the pixels show none of this world's."""

    color: str | None
    shape: str | None
    x: float
    y: float
    area: float

    def __str__(self) -> str:
        """The object in words: "red circle", "red object of no known shape"."""
        color = self.color or "strangely coloured"
        return f"{color} {self.shape}" if self.shape else f"{color} object of no known shape"


@dataclass(frozen=True)
class ReadScene:
    """What an image shows. Without a light, even background nothing can be read and there are no objects."""

    objects: tuple[ReadObject, ...]
    has_background: bool


def read_scene(image: NDArray[np.uint8]) -> ReadScene:
    """Read the objects of an image."""
    pixels = image.astype(np.float32)
    background = np.median(pixels.reshape(-1, 3), axis=0)
    offset = pixels - background
    is_stained = np.square(offset).sum(axis=-1) > BACKGROUND_TOLERANCE**2
    if background.min() < MIN_BACKGROUND_VALUE or is_stained.mean() > 1 - MIN_BACKGROUND_SHARE:
        return ReadScene((), has_background=False)
    label, coverage = _unmix(offset, _PALETTE - background)
    objects: list[ReadObject] = []
    for color in range(len(_PALETTE)):
        own_coverage = np.where((label == color) | (label < 0), coverage[..., color], 0)
        for piece in _pieces(label == color):
            objects.append(_read_object(pixels, piece, own_coverage))
            is_stained &= ~ndimage.binary_dilation(piece, iterations=STAIN_CLEARANCE)
    return ReadScene((*objects, *_read_stains(is_stained)), has_background=True)


def _unmix(
    offset: NDArray[np.float32], directions: NDArray[np.float32]
) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Palette index of each pixel, -1 where less than half of it is covered, and its coverage by each colour."""
    lengths = np.linalg.norm(directions, axis=1)
    along = offset @ (directions / lengths[:, None]).T
    nearest = along.argmax(axis=-1)
    label = np.where(along.max(axis=-1) >= MIN_COVERAGE * lengths[nearest], nearest, -1)
    return label, np.clip(along / lengths, 0, 1)


def _pieces(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """The connected pieces of a mask, specks left out."""
    if np.count_nonzero(mask) < MIN_BLOB_AREA:
        return []
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    areas = np.bincount(labels.ravel())[1:]
    return [labels == index + 1 for index in np.flatnonzero(areas >= MIN_BLOB_AREA)]


def _read_stains(is_stained: NDArray[np.bool_]) -> list[ReadObject]:
    """What belongs to no object: faint or grey blobs one by one, and specks together if they are many."""
    blobs = _pieces(is_stained)
    specks = is_stained & ~np.any(blobs, axis=0) if blobs else is_stained
    if np.count_nonzero(specks) > MAX_SPECK_AREA:
        blobs.append(specks)
    points = [np.nonzero(blob) for blob in blobs]
    return [ReadObject(None, None, float(x.mean()), float(y.mean()), float(len(x))) for y, x in points]


def _read_object(pixels: NDArray[np.float32], piece: NDArray[np.bool_], coverage: NDArray[np.float32]) -> ReadObject:
    rows, columns = outline_points(piece, coverage)
    area = len(rows) / FINENESS**2
    overlaps = shape_overlaps(rows, columns, area)
    best = max(SHAPES, key=overlaps.__getitem__)
    smallest, largest = RADIUS_RANGE
    is_sound = (
        overlaps[best] >= MIN_OVERLAP
        and smallest <= math.sqrt(area / UNIT_AREA[best]) <= largest
        and _hole_area(piece) <= MAX_HOLE_AREA
    )
    shape = best if is_sound else None
    return ReadObject(_read_color(pixels, piece), shape, float(columns.mean()), float(rows.mean()), area)


def _read_color(pixels: NDArray[np.float32], piece: NDArray[np.bool_]) -> str | None:
    core = ndimage.binary_erosion(piece)
    color = np.median(pixels[core if core.any() else piece], axis=0)
    distances = np.linalg.norm(_PALETTE - color, axis=1)
    nearest = int(distances.argmin())
    return _COLOR_NAMES[nearest] if distances[nearest] <= MAX_COLOR_DISTANCE else None


def _hole_area(piece: NDArray[np.bool_]) -> int:
    return int(ndimage.binary_fill_holes(piece).sum() - piece.sum())


def outline_points(
    piece: NDArray[np.bool_], coverage: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rows and columns, in pixels, of a fine grid of points inside a piece.

    Whole pixels are too coarse to tell a small circle from a square; the coverage of its edge pixels tells where the
    edge runs between them. A faint piece may be so thin that by its coverage it has no inside: then its pixels count as
    whole ones, so that every piece has an area and a place.

    Args:
        coverage: Coverage of every pixel by the colour of the piece, 0 to 1.
    """
    rows, columns = np.nonzero(piece)
    top, left = max(rows.min() - 2, 0), max(columns.min() - 2, 0)
    window = np.s_[top : rows.max() + 3, left : columns.max() + 3]
    own = coverage[window] * ndimage.binary_dilation(piece[window])
    fine = _interpolation(own.shape[0]) @ own @ _interpolation(own.shape[1]).T
    is_inside = fine >= MIN_COVERAGE
    if not is_inside.any():
        is_inside = np.kron(piece[window], np.ones((FINENESS, FINENESS), bool))
    fine_rows, fine_columns = np.nonzero(is_inside)
    return top + (fine_rows + 0.5) / FINENESS - 0.5, left + (fine_columns + 0.5) / FINENESS - 0.5


@cache
def _interpolation(size: int) -> NDArray[np.float32]:
    """The matrix that interpolates `size` pixels linearly at `FINENESS` points per pixel."""
    points = (np.arange(size * FINENESS) + 0.5) / FINENESS - 0.5
    points = points.clip(0, size - 1)
    return np.maximum(0, 1 - np.abs(points[:, None] - np.arange(size))).astype(np.float32)


def shape_overlaps(rows: NDArray[np.float64], columns: NDArray[np.float64], area: float) -> dict[str, float]:
    """Intersection over union of a set of points with each perfect shape of the same area and centre of mass."""
    dx, dy = columns - columns.mean(), rows - rows.mean()
    overlaps: dict[str, float] = {}
    for shape in SHAPES:
        shared = inside(shape, math.sqrt(area / UNIT_AREA[shape]), dx, dy).mean()
        overlaps[shape] = float(shared / (2 - shared))
    return overlaps
