"""Read the word of an image back by the glyphs that it was set in: the judge of the words world.

It shares nothing with a learned reader. What is seen is the share c of ink in each pixel, between paper and ink as the
image has them. A window w of c, of the pitch's width, is compared with each glyph t of each size:

    gain(w, t) = |w|² − |w − t|² = 2⟨w, t⟩ − |t|²

The word is the row of three to five glyphs of one size at the world's pitch, each free to stand a pixel off, that
gains most: with |c|² less the sum of its gains it leaves the least ink unexplained. A glyph that is off by more than
`MAX_ERROR` of itself is no letter, and an image with more ink than `MAX_STRAY` of a letter beside its row says nothing.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from rpo.words.prompts import LENGTHS, LETTERS
from rpo.words.world import BOX, HEIGHT, PITCH, SIZES, glyph, middles

ILLEGIBLE = "?"

MAX_ERROR = 0.4
"""Largest |w − t|² of a letter, as a share of |t|²."""

MAX_STRAY = 0.6
"""Most ink outside of the word, |c|² there, as a share of the |t|² of a letter on average."""

MIN_CONTRAST = 50.0
"""Least distance of ink from paper, in levels of a channel on average."""

DARKEST = 0.7
"""Pixels as far from the paper as this share of the farthest are ink alone."""

REACH = 2
"""Pixels by which a word may stand off the middle; the world's own keep within one."""


@dataclass(frozen=True)
class Reading:
    """What an image says."""

    word: str
    """Its letters, with `ILLEGIBLE` for what is none; empty where nothing is said."""
    error: float
    """Of the worst letter, as a share of it; infinite where nothing is said."""


NOTHING = Reading("", float("inf"))


def read_word(image: NDArray[np.uint8]) -> Reading:
    """Read an image, uint8 [16, 48, 3]."""
    ink = ink_of(image)
    if ink is None:
        return NOTHING
    found = _best_row(_gains(ink))
    energy = ndimage.uniform_filter(ink**2, (_BOX[0], _BOX[1]), mode="constant") * _BOX[0] * _BOX[1]
    errors, letters, explained = [], [], 0.0
    for gain, template, y, x in found:
        inside = float(energy[y, x])
        own = float(_energies()[template])
        errors.append((inside - gain) / own)
        letters.append(LETTERS[template % len(LETTERS)] if errors[-1] <= MAX_ERROR else ILLEGIBLE)
        explained += inside
    stray = float((ink**2).sum()) - explained
    own = float(np.mean([_energies()[template] for _, template, _, _ in found]))
    if stray > MAX_STRAY * own or set(letters) == {ILLEGIBLE}:
        return NOTHING
    return Reading("".join(letters), max(errors))


def ink_of(image: NDArray[np.uint8]) -> NDArray[np.float32] | None:
    """Share of ink in each pixel, with a margin of `PITCH` around; None where nothing stands out from the paper."""
    pixels = image.astype(np.float32)
    offset = pixels - np.median(pixels.reshape(-1, 3), axis=0)
    distance = np.linalg.norm(offset, axis=-1)
    if distance.max() < MIN_CONTRAST * np.sqrt(3):
        return None
    direction = offset[distance >= DARKEST * distance.max()].mean(axis=0)
    share = offset @ direction / (direction @ direction)
    return np.pad(share.clip(0, 1), PITCH)


_BOX = (BOX[1], PITCH)


@cache
def _templates() -> NDArray[np.float32]:
    """The glyphs of all sizes, letters first: [sizes · letters, 12 · 9]."""
    cut = [glyph(letter, size)[:, 2:-2] for size in SIZES for letter in LETTERS]
    return np.stack([one.ravel() for one in cut])


@cache
def _energies() -> NDArray[np.float32]:
    return (_templates() ** 2).sum(axis=1)


def _gains(ink: NDArray[np.float32]) -> NDArray[np.float32]:
    """gain(w, t) by place of the middle of the window and glyph: [height, width, sizes · letters], with margins."""
    windows = np.lib.stride_tricks.sliding_window_view(ink, _BOX)
    rows = slice(PITCH + HEIGHT // 2 - _BOX[0] // 2 - REACH - 1, PITCH + HEIGHT // 2 - _BOX[0] // 2 + REACH + 2)
    seen = windows[rows].reshape(-1, _BOX[0] * _BOX[1])
    gains = np.full((*ink.shape, len(_templates())), -np.inf, np.float32)
    found = (2 * seen @ _templates().T - _energies()).reshape(rows.stop - rows.start, windows.shape[1], -1)
    top, left = rows.start + _BOX[0] // 2, _BOX[1] // 2
    gains[top : top + len(found), left : left + found.shape[1]] = found
    return gains


def _best_row(gains: NDArray[np.float32]) -> list[tuple[float, int, int, int]]:
    """Gain, glyph and place (y, x) of each letter of the row that gains most."""
    by_size = gains.reshape(*gains.shape[:2], len(SIZES), len(LETTERS))
    near = ndimage.maximum_filter(by_size.max(axis=3), (3, 3, 1))
    best, place = -np.inf, (0, 0, 0, 0)
    high = PITCH + HEIGHT // 2
    for length in LENGTHS:
        for x in range(-REACH, REACH + 1):
            columns = [PITCH + middle + x for middle in middles(length)]
            total = near[high - REACH : high + REACH + 1, columns].sum(axis=1)
            y, size = np.unravel_index(total.argmax(), total.shape)
            if total[y, size] > best:
                best, place = float(total[y, size]), (length, x, high - REACH + int(y), int(size))
    length, x, y, size = place
    return [_letter_at(by_size[:, :, size], y, PITCH + middle + x, size) for middle in middles(length)]


def _letter_at(gains: NDArray[np.float32], y: int, x: int, size: int) -> tuple[float, int, int, int]:
    around = gains[y - 1 : y + 2, x - 1 : x + 2]
    down, across, letter = np.unravel_index(around.argmax(), around.shape)
    found = float(around[down, across, letter])
    return found, size * len(LETTERS) + int(letter), y - 1 + int(down), x - 1 + int(across)
