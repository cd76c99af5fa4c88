"""Images in a grid, with words around them, as one picture: what a person looks at to see what a LoRA does.

    title                                    the settings that all images share
                 column    column   …
    row's words  image     image             each may have a line of its own beneath it
    …
    name         value     value    …        numbers of a whole column

Images are shown at one size, large ones reduced and very small ones enlarged pixel by pixel; the files beside the
picture hold them as they were drawn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SMALLEST, LARGEST = 176, 320
"""Pixels of the longer side of an image in the grid."""

MOST_ROWS = 48
"""Rows that are shown; more would make a picture that few programs open."""

_TEXT, _SMALL, _TITLE = 15, 13, 18
_GAP, _MARGIN, _SIDE = 10, 24, 230
_LATIN = 0x2FF  # last letter of its blocks
_INK, _QUIET, _RULE = "#1d1c1a", "#6f6a63", "#d9d4cb"


@dataclass(frozen=True)
class SheetRow:
    """One line of images."""

    words: str
    """Beside them, such as the prompt."""
    images: Sequence[NDArray[np.uint8]]
    """One for each column, [height, width, 3], all of one size."""
    note: str = ""
    """Beneath the words, such as the seed."""
    captions: Sequence[str] = ()
    """Beneath each image."""


@dataclass(frozen=True)
class Sheet:
    """What a picture shows."""

    title: str
    subtitle: str
    columns: Sequence[str]
    rows: Sequence[SheetRow]
    footer: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By name, what stands beneath each column."""


def draw_sheet(sheet: Sheet) -> Image.Image:
    """The picture; of more than `MOST_ROWS` rows the first, which it says.

    Args:
        sheet: With at least one row.
    """
    rows = sheet.rows[:MOST_ROWS]
    height, width = reduced(rows[0].images[0]).shape[:2]
    width_of_cell = max(width, *(_longest(words) for row in rows for words in ("", *row.captions)))
    width_of_cell = max(width_of_cell, *(_longest(one) for values in ([""], *sheet.footer.values()) for one in values))
    captions = _SMALL + 8 if any(row.captions for row in rows) else 0
    across = _SIDE + len(sheet.columns) * (width_of_cell + _GAP) + 2 * _MARGIN
    left_out = f"the first {len(rows)} of {len(sheet.rows)} rows; all images are in the folder"
    subtitle = sheet.subtitle + (f"\n{left_out}" if len(sheet.rows) > len(rows) else "")
    title = [line for part in sheet.title.split("\n") for line in _wrapped(part, across - 2 * _MARGIN, _TITLE)]
    lines = [line for part in subtitle.split("\n") for line in _wrapped(part, across - 2 * _MARGIN, _SMALL)]
    top = _MARGIN + len(title) * _line(_TITLE) + len(lines) * _line(_SMALL) + _GAP
    below = top + _line(_TEXT) + _GAP + len(rows) * (height + captions + _GAP)
    down = below + len(sheet.footer) * (_line(_TEXT) + 4) + _MARGIN
    picture = Image.new("RGB", (across, down), "white")
    pen = ImageDraw.Draw(picture)
    _write(pen, title, (_MARGIN, _MARGIN), _TITLE, _INK)
    _write(pen, lines, (_MARGIN, _MARGIN + len(title) * _line(_TITLE)), _SMALL, _QUIET)
    places = [_MARGIN + _SIDE + number * (width_of_cell + _GAP) for number in range(len(sheet.columns))]
    for x, words in zip(places, sheet.columns, strict=True):
        _write(pen, _wrapped(words, width_of_cell, _TEXT)[:1], (x, top), _TEXT, _INK)
    for number, row in enumerate(rows):
        y = top + _line(_TEXT) + _GAP + number * (height + captions + _GAP)
        _row(picture, pen, row, places, (y, height))
    for number, (name, values) in enumerate(sheet.footer.items()):
        y = below + number * (_line(_TEXT) + 4)
        pen.line([(_MARGIN, y - 3), (across - _MARGIN, y - 3)], fill=_RULE)
        _write(pen, [name], (_MARGIN, y), _SMALL, _QUIET)
        for x, value in zip(places, values, strict=True):
            _write(pen, [value], (x, y), _TEXT, _INK)
    return picture


def reduced(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An image [height, width, 3] at the size that is shown; a very small one a whole number of times as large."""
    height, width = pixels.shape[:2]
    longer = max(height, width)
    if longer < SMALLEST:
        scale = -(-SMALLEST // longer)
        return pixels.repeat(scale, 0).repeat(scale, 1)
    if longer <= LARGEST:
        return pixels
    size = round(width * LARGEST / longer), round(height * LARGEST / longer)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def _row(
    picture: Image.Image, pen: ImageDraw.ImageDraw, row: SheetRow, places: Sequence[int], at: tuple[int, int]
) -> None:
    y, height = at
    note = _wrapped(row.note, _SIDE - 2 * _GAP, _SMALL) if row.note else []
    room = max(1, (height - len(note) * _line(_SMALL)) // _line(_TEXT))
    words = _wrapped(row.words, _SIDE - 2 * _GAP, _TEXT)
    if len(words) > room:
        words = [*words[: room - 1], words[room - 1][:-1].rstrip() + "…"]
    _write(pen, words, (_MARGIN, y), _TEXT, _INK)
    _write(pen, note, (_MARGIN, y + len(words) * _line(_TEXT) + 2), _SMALL, _QUIET)
    for x, pixels in zip(places, row.images, strict=True):
        shown = Image.fromarray(reduced(pixels))
        pen.rectangle((x - 1, y - 1, x + shown.width, y + shown.height), outline=_RULE)  # white images end somewhere
        picture.paste(shown, (x, y))
    for x, words in zip(places, row.captions, strict=False):
        _write(pen, [words], (x, y + height + 2), _SMALL, _QUIET)


def _write(pen: ImageDraw.ImageDraw, lines: Sequence[str], at: tuple[int, int], size: int, colour: str) -> None:
    for number, line in enumerate(lines):
        pen.text((at[0], at[1] + number * _line(size)), line, fill=colour, font=_font(size, line))


def _wrapped(text: str, width: int, size: int) -> list[str]:
    """A text in lines of so many pixels, broken between words, and within those that are longer than a line."""
    font, lines, line = _font(size, text), list[str](), ""
    for word in " ".join(text.split()).split(" "):
        if line and font.getlength(f"{line} {word}") > width:
            lines.append(line)
            line = ""
        line = f"{line} {word}".strip()
        while font.getlength(line) > width and len(line) > 1:
            cut = next(end for end in range(len(line) - 1, 0, -1) if end == 1 or font.getlength(line[:end]) <= width)
            lines.append(line[:cut])
            line = line[cut:]
    return [*lines, line]


def _longest(text: str) -> int:
    return round(_font(_TEXT, text).getlength(text)) if text else 0


def _line(size: int) -> int:
    """Pixels from one line to the next."""
    return round(size * 1.35)


def _font(size: int, text: str) -> ImageFont.FreeTypeFont:
    """A font that has the letters of a text: that of matplotlib, or one of this machine where it lacks some."""
    strange = frozenset(letter for letter in text if ord(letter) > _LATIN)
    return ImageFont.truetype(_file(strange), size)


@lru_cache(maxsize=256)
def _file(letters: frozenset[str]) -> str:
    from matplotlib import font_manager, ft2font  # here, as everywhere: it takes a second

    usual = font_manager.findfont("DejaVu Sans")
    if not letters:
        return usual
    plain = [one.fname for one in font_manager.fontManager.ttflist if one.weight in (400, "normal")]
    found = sorted({usual, *(file for file in plain if "LastResort" not in file)})  # which has boxes for everything

    def worth(file: str) -> tuple[int, bool]:
        has = ft2font.FT2Font(file).get_charmap()
        return sum(ord(letter) in has for letter in letters), file == usual

    return max(found, key=worth)
