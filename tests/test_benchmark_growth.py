"""The measurement of growth in small: its sets and runs are what rpo reads, and an audit of one holds little of it."""

import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from rpo.curation.audit import _drawn, _recorded
from rpo.curation.store.run import Run

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import growth  # noqa: E402

COUNT = 2000


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "known"))
    growth.make_pairs(tmp_path, 60)
    growth.make_run(tmp_path, COUNT)
    return tmp_path


def test_every_step_is_measured(folder):
    for name, step in growth.STEPS.items():
        assert growth.measured(step, folder).keys() == {"cpu_seconds", "peak_mb"}, name
    assert growth.status_of(folder / "run").num_pairs == 3 * COUNT // 4
    assert len(growth.read_pairs(folder / "run/export/native", limit=10)) == 10


def test_an_audit_holds_few_bytes_of_a_record(folder):
    run = Run(folder / "run")
    _recorded(run)
    tracemalloc.start()
    counts = _recorded(run)
    drawn = _drawn(run, 20, np.random.default_rng(0), kind="edit")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert counts["critiques"].asked == COUNT and len(drawn) == 20
    assert [one.source.order for one in drawn] == sorted(np.random.default_rng(0).permutation(COUNT)[:20].tolist())
    assert peak < 250 * COUNT
