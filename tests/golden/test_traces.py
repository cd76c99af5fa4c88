"""Every algorithm, objective and estimator still computes what it did when `traces.json` was written."""

import json
import sys
from itertools import combinations

import pytest

from tests.golden.traces import FILE, TOLERANCE, TRACES, main, portable, trace

KNOWN = json.loads(FILE.read_text())


LOOSER = {"directions": 5, "value/explained_variance": 10}
"""What other processors round further apart, in tolerances: where Adam moves weights whose gradient is nearly 0, by
8e-4 of all, and what is divided by how little the returns of a run vary, by 2e-3."""


def near(known, tolerance=TOLERANCE):
    """`known`, its numbers to a tolerance."""
    if isinstance(known, dict):
        times = {name: next((by for part, by in LOOSER.items() if part in name), 1) for name in known}
        return {name: near(one, times[name] * TOLERANCE) for name, one in known.items()}
    if isinstance(known, list):
        return [near(value, tolerance) for value in known]
    return pytest.approx(known, rel=tolerance, abs=tolerance) if isinstance(known, float) else known


@pytest.mark.parametrize("name", TRACES)
def test_as_it_was(name):
    assert portable(trace(name)) == near(KNOWN[name])


def test_no_trace_is_left_behind():
    assert KNOWN.keys() == TRACES.keys()


def test_no_two_could_be_taken_for_each_other():
    assert not [(one, other) for one, other in combinations(KNOWN, 2) if KNOWN[one] == near(KNOWN[other])]


def test_what_is_not_written_anew_stays(tmp_path, monkeypatch):
    file, other = tmp_path / "traces.json", next(name for name in TRACES if name != "keys")
    file.write_text(json.dumps({other: 1.0, "keys": {}}))
    monkeypatch.setattr(sys, "argv", ["traces", "write", str(file), "--only", "keys"])
    main()
    assert json.loads(file.read_text()) == {other: 1.0, "keys": portable(trace("keys"))}
