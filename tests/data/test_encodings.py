"""Where two images differ: the numbers, the cache, and that no image is decoded twice."""

from collections import Counter

import numpy as np
import pytest
import torch

from rpo.data.cache import Memory
from rpo.data.encodings import PairDifferences, grid_difference, latent_requests
from rpo.data.preference import PreferencePair, encode_png
from rpo.data.transform import PairTransform, TransformDraw
from rpo.types import Canvas

TRANSFORM = PairTransform(Canvas(32, 32))


def image(seed, patch=None, side=32):
    pixels = np.random.default_rng(seed).integers(0, 200, (side, side, 3), dtype=np.uint8)
    if patch is not None:
        top, left = patch
        pixels[top : top + 8, left : left + 8] += 51  # 0.2 of the range
    return encode_png(pixels)


def asked(differences, pair, draw=None):
    both = [differences.remembering(one) for one in latent_requests(pair, TRANSFORM, draw or TransformDraw())]
    return differences.request(pair, *both), both


def test_a_difference_is_the_mean_over_channels_and_cells():
    first = torch.zeros(3, 16, 16)
    second = first.clone()
    second[0, :4, :8] = 0.6
    assert grid_difference(first, second, cell=8).flatten().tolist() == pytest.approx([0.1, 0, 0, 0])


def test_an_edited_cell_is_found_through_crop_and_mirror(tmp_path):
    differences = PairDifferences(tmp_path, cell=8)
    pair = PreferencePair("a", image(0, patch=(8, 16)), image(0), name="pair 0")
    plain, mirrored = (asked(differences, pair, TransformDraw(flip=flip))[0] for flip in (False, True))
    expected = torch.zeros(4, 4)
    expected[1, 2] = 0.2
    torch.testing.assert_close(differences.of([plain])[0], expected)
    torch.testing.assert_close(differences.of([mirrored])[0], expected.flip(1))


def test_no_image_is_decoded_twice_and_a_second_run_decodes_none(tmp_path, monkeypatch):
    decoded = Counter()
    load = PairTransform.load
    monkeypatch.setattr(PairTransform, "load", lambda *args: decoded.update([args[2]]) or load(*args))
    source, edits = image(0), [image(0, patch=(8 * row, 0)) for row in range(3)]
    pairs = [PreferencePair("a", edit, source, name=f"pair {row}") for row, edit in enumerate(edits)]
    differences = PairDifferences(tmp_path, cell=8)
    requests, images = zip(*[asked(differences, pair) for pair in pairs], strict=True)
    for both in images:  # as the latent cache does
        for one in both:
            one.load()
    first = differences.of(requests)
    assert decoded == {"chosen": 3, "rejected": 1}
    decoded.clear()
    again = PairDifferences(tmp_path, cell=8)
    assert torch.equal(again.of([asked(again, pair)[0] for pair in pairs]), first)
    assert not decoded


def test_remembered_pixels_are_those_that_were_read(tmp_path):
    pair = PreferencePair("a", image(0), image(1), name="pair 0")
    _, (chosen, _) = asked(PairDifferences(tmp_path, cell=8), pair)
    fresh = latent_requests(pair, TRANSFORM, TransformDraw())[0].load()
    assert torch.equal(chosen.load(), fresh)
    assert torch.equal(chosen.load(), fresh)


def test_memory_is_bounded_and_what_left_it_is_read_again(tmp_path):
    differences = PairDifferences(tmp_path, cell=8, memory=Memory(0))
    pair = PreferencePair("a", image(0), image(1), name="pair 0")
    request, (chosen, _) = asked(differences, pair)
    chosen.load()
    assert request.chosen not in differences._memory
    assert differences.of([request]).shape == (1, 4, 4)


def test_two_sizes_are_refused(tmp_path):
    pair = PreferencePair("a", image(0), image(1, side=40), name="pairs.jsonl:7")
    with pytest.raises(
        ValueError, match=r"pairs.jsonl:7: the chosen image is 32x32, the rejected one 40x40; expected one size"
    ):
        asked(PairDifferences(tmp_path, cell=8), pair)
