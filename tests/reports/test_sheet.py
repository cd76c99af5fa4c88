"""The contact sheet: images where they belong, words that overlap nothing, and a size that a program opens."""

import numpy as np
import pytest

from rpo.reports.sheet import LARGEST, MOST_ROWS, SMALLEST, Sheet, SheetRow, draw_sheet, reduced

COLOURS = np.array([[[200, 0, 0], [0, 200, 0]], [[0, 0, 200], [150, 0, 150]]], np.uint8)


def flat(colour, height=64, width=64):
    return np.full((height, width, 3), colour, np.uint8)


def sheet(words="a red circle", captions=(), **changes):
    rows = [SheetRow(words, [flat(one) for one in some], "seed 7", captions) for some in COLOURS]
    return Sheet("a model", "50 steps", ["strength 0", "strength 1"], rows, **changes)


def box(picture, colour):
    rows, columns = np.nonzero((np.asarray(picture) == colour).all(-1))
    return rows.min(), rows.max() + 1, columns.min(), columns.max() + 1


def ink(picture):
    """Where anything is written: dark and without colour."""
    pixels = np.asarray(picture).astype(int)
    return (np.ptp(pixels, axis=-1) < 20) & (pixels.mean(-1) < 180)


@pytest.mark.parametrize("captions", [(), ("shapes 0.667", "a reward of a long name 0.123  another one 0.456")])
def test_images_form_a_grid_and_no_word_lies_on_another(captions):
    picture = draw_sheet(sheet(captions=captions, footer={"mean shapes": ["0.5", "0.75"]}))
    (top, down, left, right), (_, _, second, end) = box(picture, COLOURS[0, 0]), box(picture, COLOURS[0, 1])
    below, *_ = box(picture, COLOURS[1, 0])
    assert down - top == right - left == 192 == end - second
    assert second > right
    assert below > down
    assert end <= picture.width
    written = ink(picture)
    assert written[top:down, :left].any()  # the prompt beside its images
    assert not written[top:down, left - 5 : left].any()  # and not on them
    assert written[: top - 5].any()
    assert written[box(picture, COLOURS[1, 0])[1] + 5 :].any()  # the footer
    assert not written[:, -5:].any()
    assert not written[-5:].any()


def test_a_long_prompt_is_cut_to_the_height_of_its_images():
    picture = draw_sheet(sheet(words="an extraordinarily long prompt about nothing at all " * 20))
    down, below = box(picture, COLOURS[0, 0])[1], box(picture, COLOURS[1, 0])[0]
    assert not ink(picture)[down:below, :].any()
    assert draw_sheet(sheet(words="字" * 300)).size == picture.size  # words without spaces are broken, too


def test_images_are_shown_at_one_size():
    assert reduced(flat(9, 1024, 768)).shape == (LARGEST, LARGEST * 3 // 4, 3)
    assert reduced(flat(9, 200, 256)).shape == (200, 256, 3)
    small = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    assert SMALLEST <= len(reduced(small)) <= LARGEST
    assert np.array_equal(reduced(small)[1::3, 1::3], small)
    assert np.array_equal(reduced(reduced(small)), reduced(small))


def test_more_rows_than_a_picture_holds_are_left_out_and_told():
    rows = [SheetRow("a", [flat(90)])] * (MOST_ROWS + 1)
    whole, cut = (draw_sheet(Sheet("m", "s", ["seed 0"], some)) for some in (rows[:MOST_ROWS], rows))
    assert 0 < cut.height - whole.height < 40  # the line that says so
