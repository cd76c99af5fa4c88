"""The plan of docs/scale.md: its tables are what its numbers come to, and the operations are those of the base."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))
import scale_plan  # noqa: E402

KNOWN = json.loads(scale_plan.FILE.read_text())
COUNTED = KNOWN["counted"]


@pytest.fixture(autouse=True)
def counted(request, monkeypatch):
    if "slow" not in request.keywords:
        monkeypatch.setattr(scale_plan, "forward", lambda images: COUNTED[f"forward({images})"])
        monkeypatch.setattr(scale_plan, "weights", lambda: COUNTED["weights"])


def test_the_tables_that_are_kept_are_what_the_numbers_come_to_and_the_page_has_all():
    assert scale_plan.tables() == KNOWN["tables"], "run python benchmarks/scale_plan.py"
    page = (ROOT / "docs" / "scale.md").read_text()
    assert set(re.findall(r'table\("scale_plan", "(\w+)"\)', page)) == set(KNOWN["tables"])


def test_every_number_has_a_source_and_what_was_measured_a_command_that_is_there():
    assert all(one.source for one in (scale_plan.ASSUMED | scale_plan.MEASURED).values())
    for place in re.findall(r"`((?:benchmarks|tests)/[\w/]+\.py)", KNOWN["tables"]["measured"]):
        assert (ROOT / place).is_file(), place


def test_what_is_kept_of_it_and_the_steps_decide_about_the_cards(monkeypatch):
    many, few = scale_plan.whole()
    assert few < many
    by_name = {stage.name: stage.hours for stage in scale_plan.stages()}
    assert by_name["draw"][0] == pytest.approx(5 * by_name["draw"][1])
    assert by_name["draw"][0] == pytest.approx(1e8 / 0.33 * 40 * COUNTED["forward(1)"] / (989 * 0.4) / 3600)
    kept = scale_plan.ASSUMED["kept"]
    monkeypatch.setitem(scale_plan.ASSUMED, "kept", replace(kept, value=kept.value / 2))
    assert scale_plan.whole() == pytest.approx((2 * many, 2 * few))


@pytest.mark.slow
def test_the_operations_are_counted_on_the_base():
    for images in (1, 2):
        assert scale_plan.forward(images) == pytest.approx(COUNTED[f"forward({images})"])
    assert scale_plan.weights() == COUNTED["weights"]
    blocks, width, tokens, words = 60, 3072, 4096, 256
    layers = 2 * 12 * width**2 * (tokens + words)  # three projections, one back, and eight widths of two more
    attention = 4 * width * (tokens + words) ** 2
    assert scale_plan.forward(1) == pytest.approx(blocks * (layers + attention) / 1e12, rel=0.02)
