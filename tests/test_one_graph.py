"""A step of a rollout and the losses of updates are one graph each, so that a compiler sees all that a GPU is given.

A graph breaks where the host has to look at a number, or at Python that cannot be traced.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contracts.families import FAMILIES
from tests.test_waits import LISTS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = [f"step: {family}" for family in (*FAMILIES, "masked_tokens") if family not in LISTS]
BOTH = ("stable_diffusion", "sd3")
LOSSES = [f"{name}: sd3" for name in ("dpo", "grpo", "endpoint", "nft", "score as action")]
LOSSES += [f"{name}: stable_diffusion" for name in ("dpo", "grpo")]
WHOLE = [f"steps: {family}" for family in BOTH]
BROKEN = [f"step: {family}" for family in LISTS]


@pytest.fixture(scope="module")
def found():
    command = [sys.executable, str(Path(__file__).parent / "one_graph.py"), *STEPS, *LOSSES, *WHOLE, *BROKEN]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {line.pop("case"): line for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("case", [*STEPS, *LOSSES])
def test_it_is_one_graph(case, found):
    assert found[case]["breaks"] == []
    assert found[case]["graphs"] == 1
    assert found[case]["operations"] > 100


@pytest.mark.parametrize("case", WHOLE)
def test_all_steps_of_a_rollout_have_the_same_graph(case, found):
    assert found[case]["graphs"] == 1
    assert found[case]["apart"] < 1e-3


@pytest.mark.parametrize("case", BROKEN)
def test_lists_of_captions_break_it(case, found):
    assert "Data dependent operator" in found[case]["breaks"]
