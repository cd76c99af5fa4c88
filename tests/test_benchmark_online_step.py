"""The calls that an online iteration makes, as the benchmark counts them on a tiny model through the package's loop."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"

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


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    command = [sys.executable, str(FOLDER / "online_step.py"), "--preset", "tiny", "--repeats", "1", "--json"]
    done = subprocess.run(command, cwd=tmp_path_factory.mktemp("run"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", EXPECTED)
def test_an_iteration_makes_no_call_too_many(report, name):
    expected = EXPECTED[name]
    assert report["variants"][name]["counts"] == {
        "forward_calls": expected["forward_calls"],
        "forward_images": expected["forward"],
        "forward_with_graph_calls": expected["backward_calls"],
        "forward_with_graph_images": expected["with_graph"],
        "backward_calls": expected["backward_calls"],
        "backward_images": expected["backward"],
        "decode_calls": 1,
        "decode_images": 8,
    }


def test_the_graph_of_the_rollout_gives_the_gradient_of_a_second_forward(report):
    assert 0 < report["gradient_difference"] < 1e-4


@pytest.mark.parametrize("name", ["keep", "frozen", "half"])
def test_every_backward_lets_go_of_its_part_of_the_kept_graph(report, name):
    peak, *left = report["variants"][name]["graph_mib"]
    count = len(left)
    assert count == EXPECTED[name]["backward_calls"]
    assert left == pytest.approx([peak * (count - 1 - done) / count for done in range(count)], abs=0.05 * peak)


def test_without_a_kept_graph_one_micro_batch_is_in_memory(report):
    peak, *left = report["variants"]["ddpo"]["graph_mib"]
    assert peak == pytest.approx(report["variants"]["keep"]["graph_mib"][0] / 5, rel=0.1)
    assert max(left) < 0.05 * peak


def test_every_number_of_the_table_is_measured(report):
    for line in report["variants"].values():
        assert line["units"] > line["counts"]["forward_images"] / 2  # processor time is noisy; this it never is
        assert min(line["seconds"], line["peak_memory_gib"], line["units_of_an_image_alone"]) > 0
    assert all(price > 0 for price in report["prices"].values())


def test_a_missed_target_and_another_gradient_are_named(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from online_step import problems

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
