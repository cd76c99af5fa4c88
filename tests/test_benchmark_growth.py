"""The measurements of growth in small: what they make is what rpo reads, and nothing is lost in simulated kills."""

import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from rpo.curation.audit import _drawn, _recorded
from rpo.curation.store.address import Store
from rpo.curation.store.run import CurationRun

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import curation_scale  # noqa: E402
import growth  # noqa: E402

COUNT = 1500


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "known"))
    monkeypatch.setattr(curation_scale, "SHARD", 100)
    return tmp_path


@pytest.mark.slow
def test_every_step_is_measured(folder):
    growth.make_pairs(folder, 60)
    read, identify, *_ = growth.steps_of().values()
    assert all(growth.measured(step, folder).keys() == {"cpu_seconds", "peak_mb"} for step in (read, identify))
    curation_scale.make_run(folder / "run", COUNT)
    pairs = {name: curation_scale.measured(step, folder)["pairs"] for name, step in curation_scale.STEPS.items()}
    assert len(set(pairs.values())) > 1 and pairs["status"] == pairs["export parquet"] == 3 * COUNT // 4


@pytest.mark.slow
def test_training_is_measured(folder, monkeypatch):
    monkeypatch.setattr(growth, "UPDATES", 6)
    growth.make_pairs(folder, 60)
    *_, train, train_on_more = growth.steps_of(3).values()
    for step in (train, train_on_more):
        told = growth.measured(step, folder)
        assert told["to_the_first_update"] > 0 and told["an_update_early"] > 0 and told["an_update_late"] > 0


@pytest.mark.slow
def test_workers_are_measured(folder):
    one, two = (curation_scale.worked(workers, 64, folder) for workers in (1, 2))
    assert one["records"] == two["records"] == 64 and one["pairs"] == two["pairs"] > 0


def test_kills_lose_and_double_nothing(folder, monkeypatch):
    monkeypatch.setattr(curation_scale, "SHARD", 3)
    monkeypatch.setattr(curation_scale, "WORKERS", 8)
    row = curation_scale.simulated(500, folder)
    assert (row["lost"], row["duplicates"]) == (0, 0)
    assert row["workers killed"] > 5 and row["drivers killed"] > 5 and row["shards begun again"] > 5


def test_a_store_that_loses_a_shard_is_found_out(folder):
    curation_scale.make_run(folder / "run", COUNT)
    store = Store(folder / "run")
    assert curation_scale.looked_for(store, COUNT // 100, COUNT) == (0, 0)
    store.remove("shards/0000003.json")
    assert curation_scale.looked_for(store, COUNT // 100, COUNT) == (100, 0)


@pytest.mark.slow
def test_an_audit_holds_few_bytes_of_a_record(folder):
    curation_scale.make_run(folder / "run", COUNT)
    run = CurationRun(folder / "run")
    _recorded(run)
    tracemalloc.start()
    counts = _recorded(run)
    drawn = _drawn(run, 20, np.random.default_rng(0), kind="edit")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert counts["critiques"].asked == COUNT and len(drawn) == 20
    assert [one.source.order for one in drawn] == sorted(np.random.default_rng(0).permutation(COUNT)[:20].tolist())
    assert peak < 500 * COUNT + 2_000_000
