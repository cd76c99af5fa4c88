"""Near-duplicates: the hash of an image, and which of many are left out, against the definition."""

import numpy as np
import pytest
from PIL import Image

from rpo.curation.duplicates import are_first, look_of
from tests.curation.fakes import picture


def bits_between(one, other):
    return (int(look_of(one), 16) ^ int(look_of(other), 16)).bit_count()


def photograph(seed, size=(96, 80)):
    return picture(seed, (6, 5)).resize(size, Image.Resampling.BICUBIC)


def test_the_same_picture_has_nearly_the_same_hash_and_another_has_not(tmp_path):
    images = [photograph(seed) for seed in range(8)]
    for number, image in enumerate(images):
        image.resize((64, 53)).save(tmp_path / "again.jpg", quality=70)
        assert bits_between(image, Image.open(tmp_path / "again.jpg")) <= 4
        assert all(bits_between(image, other) > 12 for other in images[:number])


def left_out_by_definition(looks, groups, bits):
    kept = []
    for place, look in enumerate(looks):
        near = (one for one in kept if groups[one] != groups[place] and (looks[one] ^ look).bit_count() <= bits)
        if next(near, None) is None:
            kept.append(place)
    return kept


@pytest.mark.parametrize("bits", [0, 1, 4, 15])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_kept_is_what_the_definition_says(bits, seed):
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2**63, 12).tolist()
    looks = [
        centres[rng.integers(12)] ^ sum(1 << int(bit) for bit in rng.integers(0, 64, rng.integers(0, 2 * bits + 2)))
        for _ in range(200)
    ]
    looks = [look % 2**64 for look in looks]
    groups = rng.integers(0, 150, 200).tolist()
    found = are_first(np.array(looks, np.uint64), np.array(groups, np.uint64), bits)
    expected = left_out_by_definition(looks, groups, bits)
    assert np.flatnonzero(found).tolist() == expected and len(expected) < 200


def test_of_nothing_nothing_is_left_out():
    assert are_first(np.empty(0, np.uint64), np.empty(0, np.uint64), 4).tolist() == []
