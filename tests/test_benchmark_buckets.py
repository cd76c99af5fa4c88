"""The measurement of buckets in small: its sets are what it says, and their buckets are near the square's area."""

import math
import sys
from pathlib import Path

from rpo.data.buckets import make_buckets
from rpo.data.readers import read_pairs
from rpo.types import Canvas

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import buckets  # noqa: E402


def test_the_set_has_as_many_sizes_as_asked_for_in_buckets_near_the_square(tmp_path):
    sizes = buckets.shapes(40, 128)
    assert len(set(sizes)) == 40
    pairs = read_pairs(buckets.written(tmp_path / "many", 80, sizes))
    assert [pair.facts("chosen").size for pair in pairs] == sizes * 2
    assert pairs[79].prompt == "prompt 79"
    found = make_buckets(pairs, Canvas(128, 128), buckets.STEP)
    assert 10 < len(found.canvases) < 20
    assert all(0.7 * 128**2 < math.prod(canvas) <= 128**2 for canvas in found.canvases)
