"""The calls that an online iteration makes, as the benchmark counts them on a tiny model through the package's loop."""

import io
import json
import sys
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.marks import slow_but

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from online_step import main, problems  # noqa: E402

# 8 images of 5 steps with guidance: 80 forwards of one image to draw them. A batch is all images with both branches,
# but the frozen negative branch is a forward of its own.
EXPECTED = {
    "ddpo": {"forward_calls": 10, "forward": 160, "with_graph": 80, "backward_calls": 5, "backward": 80},
    "keep": {"forward_calls": 5, "forward": 80, "with_graph": 80, "backward_calls": 5, "backward": 80},
    "frozen": {"forward_calls": 10, "forward": 80, "with_graph": 40, "backward_calls": 5, "backward": 40},
    "again": {"forward_calls": 15, "forward": 120, "with_graph": 40, "backward_calls": 5, "backward": 40},
    "half": {"forward_calls": 10, "forward": 80, "with_graph": 24, "backward_calls": 3, "backward": 24},
    "score": {"forward_calls": 10, "forward": 80, "with_graph": 40, "backward_calls": 5, "backward": 40},
}


QUICK = ("half",)
"""A kept graph of some of the steps, and a frozen branch."""


@cache
def report(*variants):
    words = ["online_step.py", "--preset", "tiny", "--repeats", "1", "--json", "--variants", *variants]
    with patch.object(sys, "argv", words), redirect_stdout(io.StringIO()) as said:
        main()
    return json.loads(said.getvalue())


@pytest.mark.parametrize("name", slow_but(QUICK, EXPECTED))
def test_an_iteration_makes_no_call_too_many(name):
    expected = EXPECTED[name]
    assert report(name)["variants"][name]["counts"] == {
        "forward_calls": expected["forward_calls"],
        "forward_images": expected["forward"],
        "forward_with_graph_calls": expected["backward_calls"],
        "forward_with_graph_images": expected["with_graph"],
        "backward_calls": expected["backward_calls"],
        "backward_images": expected["backward"],
        "decode_calls": 1,
        "decode_images": 8,
    }


@pytest.mark.slow
def test_the_graph_of_the_rollout_gives_the_gradient_of_a_second_forward():
    assert 0 < report("ddpo", "keep")["gradient_difference"] < 1e-4


@pytest.mark.parametrize("name", slow_but(QUICK, ("keep", "frozen", "half")))
def test_every_backward_lets_go_of_its_part_of_the_kept_graph(name):
    peak, *left = report(name)["variants"][name]["graph_mib"]
    count = len(left)
    assert count == EXPECTED[name]["backward_calls"]
    assert left == pytest.approx([peak * (count - 1 - done) / count for done in range(count)], abs=0.05 * peak)


@pytest.mark.slow
def test_without_a_kept_graph_one_micro_batch_is_in_memory():
    both = report("ddpo", "keep")
    peak, *left = both["variants"]["ddpo"]["graph_mib"]
    assert peak == pytest.approx(both["variants"]["keep"]["graph_mib"][0] / 5, rel=0.1)
    assert max(left) < 0.05 * peak


@pytest.mark.parametrize("name", slow_but(QUICK, EXPECTED))
def test_every_number_of_the_table_is_measured(name):
    for line in report(name)["variants"].values():
        assert line["units"] > line["counts"]["forward_images"] / 2  # processor time is noisy; this it never is
        assert min(line["seconds"], line["peak_memory_gib"], line["units_of_an_image_alone"]) > 0
    assert all(price > 0 for price in report(name)["prices"].values())


def test_a_missed_target_and_another_gradient_are_named():
    lines = {
        "keep": {"units": 229.5, "target": 229.0},
        "frozen": {"units": 189.0, "target": 190.0},
        "half": {"units": 300.0, "target": None},
    }
    wrong = problems({"variants": lines, "dtype": "float32", "gradient_difference": 0.25})
    assert wrong == [
        "keep costs 229.5 U, more than its 229.0 U",
        "the gradients of ddpo and keep differ by 0.25, more than 0.0001",
    ]
    assert problems({"variants": {}, "dtype": "bfloat16", "gradient_difference": 0.25}) == []
