import math

import numpy as np
import pytest
import torch
from PIL import Image

from rpo.data.preference import PreferencePair
from rpo.data.transform import PairTransform, TransformDraw, Window, caption_dropped
from rpo.types import Canvas
from tests.data.samples import noise, png


def expected(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def both(transform, chosen, rejected, draw):
    windows = transform.windows(chosen.size, rejected.size, draw)
    return [transform.pixels(image, window) for image, window in zip((chosen, rejected), windows, strict=True)]


def test_an_image_that_fits_keeps_its_pixels_to_the_bit():
    image = noise(0, (16, 16))
    pixels, _ = both(PairTransform(Canvas(16, 16)), image, image, TransformDraw())
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, expected(image))


@pytest.mark.parametrize("size", [(16, 23), (23, 16), (16, 24)])
def test_a_short_side_that_fits_is_cut_and_not_resampled(size):
    image = noise(0, size)
    pixels, _ = both(PairTransform(Canvas(16, 16)), image, image, TransformDraw())
    left, top = (round((length - 16) / 2) for length in size)
    assert torch.equal(pixels, expected(image.crop((left, top, left + 16, top + 16))))


def test_scaling_is_bilinear_on_the_short_side():
    image = noise(0, (40, 30))
    pixels, _ = both(PairTransform(Canvas(16, 16)), image, image, TransformDraw())
    scaled = image.resize((21, 16), Image.Resampling.BILINEAR)
    assert torch.equal(pixels, expected(scaled.crop((2, 0, 18, 16))))


def test_flip_mirrors_left_and_right():
    image = noise(0)
    plain, _ = both(PairTransform(Canvas(16, 16)), image, image, TransformDraw(flip=False))
    mirrored, _ = both(PairTransform(Canvas(16, 16)), image, image, TransformDraw(flip=True))
    assert torch.equal(mirrored, plain.flip(-1))
    assert not torch.equal(mirrored, plain)


def test_aligned_pairs_stay_aligned_under_every_draw():
    transform = PairTransform(
        Canvas(24, 24), crop="random", flip=True
    )  # the short side: no resampling to blur the identity
    original = noise(0, (40, 24))
    edited = Image.fromarray(255 - np.asarray(original))
    seen = set()
    for draw_index in range(50):
        draw = transform.draw(seed=1, pair_index=7, draw_index=draw_index)
        seen.add(transform.windows(original.size, edited.size, draw))
        first, second = both(transform, original, edited, draw)
        assert torch.equal((255 - first * 255).round(), (second * 255).round())
    assert all(chosen == rejected for chosen, rejected in seen)
    assert len(seen) > 10


def test_unrelated_sizes_share_the_flip_and_are_centred_one_by_one():
    transform = PairTransform(Canvas(16, 16), crop="random", flip=True)
    draw = TransformDraw(flip=True, crop=(0.0, 0.9))
    chosen, rejected = transform.windows((32, 16), (16, 48), draw)
    assert chosen == Window(left=8, top=0, flip=True)
    assert rejected == Window(left=0, top=16, flip=True)


def test_every_crop_position_is_reached_and_none_outside():
    transform = PairTransform(Canvas(16, 16))
    lefts = {
        transform.windows((20, 16), (20, 16), TransformDraw(crop=(at, at)))[0].left
        for at in [*torch.linspace(0, 0.999, 50).tolist(), math.nextafter(1, 0)]
    }
    assert lefts == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("crop", [(1.0, 0.0), (0.0, -0.1)])
def test_a_crop_outside_the_image_is_refused(crop):
    with pytest.raises(ValueError, match="expected two numbers from 0 up to but without 1"):
        TransformDraw(crop=crop)


def test_a_window_of_another_size_is_refused():
    with pytest.raises(ValueError, match="leaves the image"):
        PairTransform(Canvas(16, 16)).pixels(noise(0), Window(left=4, top=0, flip=False))


def test_draws_are_functions_of_their_arguments_alone():
    transform = PairTransform(Canvas(16, 16), crop="random", flip=True)
    first = transform.draw(seed=3, pair_index=5, draw_index=2)
    for other in ({"seed": 4}, {"pair_index": 6}, {"draw_index": 3}):
        assert transform.draw(**({"seed": 3, "pair_index": 5, "draw_index": 2} | other)) != first
    assert transform.draw(seed=3, pair_index=5, draw_index=2) == first
    flips = [transform.draw(seed=0, pair_index=i, draw_index=0).flip for i in range(2000)]
    assert abs(sum(flips) / 2000 - 0.5) < 0.05  # 4.5 standard deviations


def test_flip_and_random_crop_happen_only_on_request():
    draws = [PairTransform(Canvas(16, 16)).draw(seed=0, pair_index=i, draw_index=0) for i in range(50)]
    assert set(draws) == {TransformDraw()}


def test_load_reads_the_side_asked_for():
    record = PreferencePair("p", png(0), png(1))
    transform = PairTransform(Canvas(16, 16))
    windows = transform.windows(record.facts("chosen").size, record.facts("rejected").size, TransformDraw())
    assert torch.equal(transform.load(record, "chosen", windows[0]), expected(noise(0)))
    assert torch.equal(transform.load(record, "rejected", windows[1]), expected(noise(1)))


def test_bad_transforms_are_refused():
    with pytest.raises(ValueError) as error:
        PairTransform(Canvas(0, 0))
    assert "the canvas is 0x0" in str(error.value)
    with pytest.raises(ValueError) as error:
        PairTransform(Canvas(16, 16), crop="centre")  # pyright: ignore[reportArgumentType]
    assert str(error.value) == 'crop is \'centre\'; expected "center" or "random"; choose one'


def test_captions_are_dropped_at_the_rate_and_reproducibly():
    def dropped(rate, seed=0):
        return {i for i in range(4000) if caption_dropped(seed=seed, pair_index=i, draw_index=1, rate=rate)}

    assert abs(len(dropped(0.2)) / 4000 - 0.2) < 0.03  # 4.7 standard deviations
    assert dropped(0.2) == dropped(0.2)
    assert dropped(0.2) != dropped(0.2, seed=1)
    assert dropped(0.1) < dropped(0.2)
    assert dropped(0.0) == set()
    assert len(dropped(1.0)) == 4000


def test_dropping_changes_from_use_to_use():
    uses = [caption_dropped(seed=0, pair_index=3, draw_index=i, rate=0.5) for i in range(50)]
    assert True in uses
    assert False in uses


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(ValueError) as error:
        caption_dropped(seed=0, pair_index=0, draw_index=0, rate=rate)
    assert str(error.value) == f"caption dropping rate is {rate}; expected 0 to 1; Diffusion-DPO takes 0.2"


@pytest.mark.parametrize("size", [(40, 30), (16, 16), (20, 50)])
def test_what_is_told_of_a_window_finds_its_pixels(size):
    """In the image as it is seen: scaled, and mirrored before it is cut, as in SDXL's own training."""
    transform, image = PairTransform(Canvas(16, 24), crop="random", flip=True), noise(0, size)
    width = max(24, 16 * size[0] // size[1])
    scaled = image.resize((width, 24 * size[1] // size[0] if width == 24 else 16), Image.Resampling.BILINEAR)
    mirrored = set()
    for draw_index in range(12):
        window, _ = transform.windows(size, size, transform.draw(seed=0, pair_index=0, draw_index=draw_index))
        height, width, top, left, *canvas = transform.told(size, window)
        assert (width, height) == size and canvas == [16, 24]
        seen = scaled.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if window.flip else scaled
        assert torch.equal(transform.pixels(image, window), expected(seen.crop((left, top, left + 24, top + 16))))
        mirrored.add(window.flip)
    assert mirrored == {False, True}
