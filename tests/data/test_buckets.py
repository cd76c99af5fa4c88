"""What sizes images are trained at: near their own shape, of the nominal area at most, and never enlarged."""

import math

import pytest

from rpo.data.buckets import bucket_of, make_buckets, one_bucket
from rpo.types import Canvas
from tests.data.samples import pair, png

SQUARE = Canvas(512, 512)
SIZES = [(512, 512), (513, 512), (1600, 900), (900, 1600), (3000, 1000), (8000, 100), (65, 4000), (64, 64), (700, 300)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("step", [16, 32, 64])
def test_a_bucket_keeps_step_area_and_image(size, step):
    canvas = bucket_of(size, SQUARE, step)
    assert canvas is not None
    assert canvas.height % step == canvas.width % step == 0
    assert math.prod(canvas) <= math.prod(SQUARE)
    assert canvas.width <= size[0] and canvas.height <= size[1]


@pytest.mark.parametrize("size", SIZES[:4])
def test_little_is_cut_of_usual_images(size):
    canvas = bucket_of(size, SQUARE, 64)
    scale = max(canvas.width / size[0], canvas.height / size[1])
    assert math.prod(canvas) / (size[0] * size[1] * scale**2) > 0.9
    assert math.prod(canvas) > 0.85 * math.prod(SQUARE)


def test_buckets_of_known_sizes():
    assert bucket_of((512, 512), SQUARE, 64) == bucket_of((2048, 2048), SQUARE, 32) == SQUARE
    assert bucket_of((300, 300), SQUARE, 64) == Canvas(256, 256)
    assert bucket_of((768, 1344), Canvas(1024, 1024), 64) == Canvas(1344, 768)
    assert bucket_of((63, 4000), SQUARE, 64) is None


def test_a_shape_turned_on_its_side_has_the_bucket_turned():
    for width in range(64, 2000, 37):
        upright, lying = bucket_of((width, 700), SQUARE, 32), bucket_of((700, width), SQUARE, 32)
        assert upright == lying[::-1]


def test_a_set_is_divided_and_both_sides_of_a_pair_go_together():
    sizes = [((64, 64), (64, 64)), ((64, 32), (64, 32)), ((64, 32), (32, 64)), ((128, 128), (64, 64))]
    pairs = [
        pair(index, chosen=png(2 * index, one), rejected=png(2 * index + 1, other), name=f"pair {index}")
        for index, (one, other) in enumerate(sizes)
    ]
    buckets = make_buckets(pairs, Canvas(64, 64), 16)
    assert dict(zip(buckets.canvases, buckets.members, strict=True)) == {
        Canvas(32, 32): [2],
        Canvas(32, 64): [1],
        Canvas(64, 64): [0, 3],
    }
    assert buckets.of_pair == [2, 1, 0, 2]
    assert buckets.notes(2) == [
        "3 buckets (height x width): 64x64 has most pairs (2), 32x32 fewest (1)",
        "2 of them have fewer pairs than the 2 that are trained together, so that a pair may be there twice: "
        "32x32, 32x64",
    ]
    assert one_bucket(4, Canvas(64, 64)).notes(2) == ["1 bucket (height x width): 64x64 (4 pairs)"]


def test_the_edited_image_counts_too():
    edits = pair(0, chosen=png(0, (64, 64)), rejected=png(1, (64, 64)), original=png(2, (64, 32)))
    assert make_buckets([edits], Canvas(64, 64), 16).canvases == (Canvas(32, 64),)


def test_an_image_smaller_than_every_bucket_is_named():
    small = pair(0, chosen=png(0, (40, 20)), rejected=png(1, (40, 20)), name="small")
    with pytest.raises(
        ValueError, match="^small: 40 px wide and 20 high is less than the smallest bucket, 32x32, and images"
    ):
        make_buckets([small], Canvas(64, 64), 32)
