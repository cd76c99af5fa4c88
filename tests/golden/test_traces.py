"""Every algorithm, objective and estimator still computes what it did when `traces.json` was written."""

import json
from itertools import combinations

import pytest

from tests.golden.traces import FILE, TOLERANCE, TRACES, portable, trace

KNOWN = json.loads(FILE.read_text())


SMALL_DENOMINATOR = "value/explained_variance"
"""Of a value that hardly learnt, divided by the little that returns vary: other processors are 2e-3 off."""


def near(known, tolerance=TOLERANCE):
    """`known`, its numbers to a tolerance."""
    if isinstance(known, dict):
        return {name: near(one, (10 if SMALL_DENOMINATOR in name else 1) * TOLERANCE) for name, one in known.items()}
    if isinstance(known, list):
        return [near(value) for value in known]
    return pytest.approx(known, rel=tolerance, abs=tolerance) if isinstance(known, float) else known


@pytest.mark.parametrize("name", TRACES)
def test_as_it_was(name):
    assert portable(trace(name)) == near(KNOWN[name])


def test_no_trace_is_left_behind():
    assert KNOWN.keys() == TRACES.keys()


def test_no_two_could_be_taken_for_each_other():
    assert not [(one, other) for one, other in combinations(KNOWN, 2) if KNOWN[one] == near(KNOWN[other])]
