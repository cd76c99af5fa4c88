"""The words world: images of 48 x 16 pixels, each with one word in dark ink on light paper.

A word is set in capitals of Pillow's own font at a fixed pitch, about the middle of the image. Size, place, ink and
paper are drawn at random. This is about the smallest format in which RapidOCR reads more than 95 % of the words: 99 %
of 150 when it was chosen, and all of 150 with blur and noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from rpo.words.prompts import HELD_OUT_PLACES, prompt_of, words

WIDTH, HEIGHT = 48, 16
PITCH = 9
"""Pixels from the middle of a letter to that of the next; five of them fill the image."""

SIZES = (11, 12)
"""Of the font, in pixels; capitals are about three quarters as high."""

MAX_SHIFT = 1
"""Pixels by which a word may stand off the middle, either way."""

INK_RANGE, PAPER_RANGE = (0, 110), (205, 250)
"""Range of each channel."""

MISTAKES = {
    "B": "R", "R": "B", "C": "D", "D": "C", "F": "P", "P": "F", "H": "K", "K": "H", "L": "T", "T": "L", "N": "S",
    "S": "N", "A": "O", "O": "A", "E": "I", "I": "E", "U": "O",
}  # fmt: skip
"""A letter that looks like it, which stands in its place where a training image is misspelt."""

SUPERSAMPLING = 8

STROKE = 3
"""By which a line is fatter on either side, in parts of a pixel: thin ones fade in an autoencoder."""

BOX = (13, 12)
"""Width and height in which a glyph is drawn, in pixels."""


@dataclass(frozen=True)
class Setting:
    """Everything that determines an image."""

    word: str
    size: int = 12
    x: int = 0
    y: int = 0
    """Pixels to the right of the middle, and below it."""
    ink: tuple[int, int, int] = (30, 30, 30)
    paper: tuple[int, int, int] = (235, 235, 235)


def render(setting: Setting) -> NDArray[np.uint8]:
    """Set a word with anti-aliased edges; returns [16, 48, 3]. What lies outside the image is cut off."""
    coverage = cover(setting.word, setting.size, setting.x, setting.y)[..., None]
    paper, ink = np.array(setting.paper, np.float32), np.array(setting.ink, np.float32)
    return np.rint(paper + coverage * (ink - paper)).astype(np.uint8)


def cover(word: str, size: int, x: int, y: int) -> NDArray[np.float32]:
    """Share of each pixel that ink covers, [16, 48]."""
    width, height = BOX
    margin = width  # so that a letter which is cut off needs no care
    canvas = np.zeros((HEIGHT + 2 * margin, WIDTH + 2 * margin), np.float32)
    for middle, letter in zip(middles(len(word)), word, strict=True):
        left, top = margin + middle + x - width // 2, margin + HEIGHT // 2 + y - height // 2
        patch = canvas[top : top + height, left : left + width]
        np.maximum(patch, glyph(letter, size), out=patch)
    return canvas[margin:-margin, margin:-margin]


def middles(length: int) -> list[int]:
    """Where the letters of a word stand that is in the middle of the image."""
    first = WIDTH // 2 - PITCH * (length - 1) // 2
    return [first + PITCH * place for place in range(length)]


@cache
def glyph(letter: str, size: int) -> NDArray[np.float32]:
    """Coverage of each pixel of a box of 13 x 12 by a letter in its middle."""
    width, height = BOX
    fine = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    font = ImageFont.load_default(size * SUPERSAMPLING)
    left, top, right, bottom = font.getbbox(letter)
    x, y = (fine.width - left - right) / 2, (fine.height - font.getbbox("H")[1] - font.getbbox("H")[3]) / 2
    ImageDraw.Draw(fine).text((round(x), round(y)), letter, font=font, fill=255, stroke_width=STROKE)
    blocks = np.asarray(fine, np.float32).reshape(height, SUPERSAMPLING, width, SUPERSAMPLING)
    return blocks.mean(axis=(1, 3)) / 255


def draw_setting(word: str, rng: np.random.Generator) -> Setting:
    """Draw how a word is set."""
    x, y = rng.integers(-MAX_SHIFT, MAX_SHIFT + 1, 2).tolist()
    ink, paper = (tuple(rng.integers(low, high + 1, 3).tolist()) for low, high in (INK_RANGE, PAPER_RANGE))
    return Setting(word, int(rng.choice(SIZES)), x, y, ink, paper)


def misspelt(word: str, share: float, rng: np.random.Generator) -> str:
    """The word with each letter mistaken for its like with a probability of `share`; never one out of domain."""
    letters = list(word)
    for place, is_wrong in enumerate((rng.random(len(word)) < share).tolist()):
        mistake = MISTAKES[word[place]]
        if is_wrong and (mistake, place) not in HELD_OUT_PLACES:
            letters[place] = mistake
    return "".join(letters)


def training_images(seed: int, count: int, *, mistakes: float) -> tuple[NDArray[np.uint8], list[str]]:
    """Draw pretraining data: images [count, 16, 48, 3] and their captions, as many of each length.

    Images are not always what their captions say, as in data from the web.

    Args:
        seed: Same seed, same data; a longer draw starts with the shorter one.
        mistakes: Probability of each letter to be drawn as another one.
    """
    rng = np.random.default_rng(seed)
    pools = _by_length(words("train"))
    images = np.empty((count, HEIGHT, WIDTH, 3), np.uint8)
    captions: list[str] = []
    for index in range(count):
        pool = pools[rng.integers(len(pools))]
        word = pool[rng.integers(len(pool))]
        images[index] = render(draw_setting(misspelt(word, mistakes, rng), rng))
        captions.append(prompt_of(word))
    return images, captions


def _by_length(known: Sequence[str]) -> list[list[str]]:
    lengths = sorted({len(word) for word in known})
    return [[word for word in known if len(word) == length] for length in lengths]
