"""The pipeline: what is asked how often, in which thread, and what an error costs."""

import threading
import time
from collections import Counter
from contextlib import contextmanager

import pytest
import torch

from rpo.curation.pipeline import Pipeline, Stage
from rpo.curation.records import Fault, Unavailable
from rpo.curation.store.shards import StageRecords


class Notes:
    """An observer that counts."""

    def __init__(self):
        self.began, self.kept, self.faults = Counter(), Counter(), Counter()

    @contextmanager
    def batch(self, stage):
        self.began[stage] += 1
        yield
        self.began[stage] -= 1

    def recorded(self, stage, *, is_fault):
        (self.faults if is_fault else self.kept)[stage] += 1


def stage(name, ask=lambda items: [item.upper() for item in items], **changes):
    options = {
        "batch_size": 2,
        "concurrency": 1,
        "wants": lambda record: True,
        "load": str,
        "keep": lambda record, item, answer: {"answer": answer},
    }
    return Stage(name, **(options | {"ask": ask} | changes))


def run(folder, stages, chunks, notes=None):
    records = {one.name: StageRecords(folder / one.name, 0) for one in stages}
    Pipeline(stages, records, notes or Notes()).run(chunks)
    return records


def test_records_go_through_all_stages(tmp_path):
    notes = Notes()
    stages = [stage("sources"), stage("critiques", wants=lambda record: record != "b")]
    records = run(tmp_path, stages, [["a", "b", "c"], ["d"]], notes)
    assert [records["sources"][one]["answer"] for one in "abcd"] == ["A", "B", "C", "D"]
    assert sorted(records["critiques"]) == ["a", "c", "d"]
    assert notes.kept == {"sources": 4, "critiques": 3}
    assert set(notes.began.values()) == {0}


def test_what_is_done_is_not_asked_again_and_batches_keep_their_members(tmp_path):
    asked = []

    def ask(items):
        asked.append(list(items))
        return items

    done = StageRecords(tmp_path / "sources", 0)
    for record in "abc":
        done.append({"id": record, "answer": "before"})
    records = run(tmp_path, [stage("sources", ask)], [["a", "b", "c", "d", "e"]])
    assert asked == [["c", "d"], ["e"]]
    assert records["sources"]["c"]["answer"] == "before"
    assert records["sources"]["d"]["answer"] == "d"


def test_the_latest_stage_goes_first(tmp_path):
    order = []

    def ask_of(name):
        return lambda items: [order.append(name + item) or item for item in items]

    stages = [stage("sources", ask_of("s"), batch_size=1), stage("critiques", ask_of("c"), batch_size=1)]
    run(tmp_path, stages, [["1", "2"], ["3"], ["4"]])
    assert order == ["s1", "s2", "c1", "c2", "s3", "c3", "s4", "c4"]


def test_one_item_that_raises_is_alone_at_fault(tmp_path):
    def ask(items):
        if "b" in items:
            raise RuntimeError("no b, please")
        return [item.upper() for item in items]

    records = run(tmp_path, [stage("sources", ask, batch_size=4)], [["a", "b", "c"]])
    assert [records["sources"][one].get("answer") for one in "abc"] == ["A", None, "C"]
    assert records["sources"]["b"]["fault"] == {"kind": "raised", "message": "RuntimeError: no b, please", "raw": ""}


def test_a_fault_is_recorded_and_what_keep_refuses_is_one(tmp_path):
    notes = Notes()
    keep = lambda record, item, answer: Fault("invalid", "not so") if record == "b" else {"answer": answer}  # noqa: E731
    ask = lambda items: [Fault("parse_error", "no JSON", "prose") if one == "a" else one for one in items]  # noqa: E731
    records = run(tmp_path, [stage("critiques", ask, keep=keep)], [["a", "b", "c"]], notes)
    assert records["critiques"]["a"]["fault"]["raw"] == "prose"
    assert records["critiques"]["b"]["fault"]["kind"] == "invalid"
    assert notes.faults == {"critiques": 2}


@pytest.mark.parametrize(
    "error", [Unavailable("gone"), MemoryError(), OSError(28, "no space"), torch.AcceleratorError("device-side assert")]
)
def test_what_is_not_the_items_fault_stops_the_run_and_is_not_recorded(tmp_path, error):
    def ask(items):
        if "c" in items:
            raise error
        return items

    with pytest.raises(type(error)):
        run(tmp_path, [stage("critiques", ask)], [["a", "b", "c", "d"]])
    assert sorted(StageRecords(tmp_path / "critiques")) == ["a", "b"]


def test_a_strict_stage_raises(tmp_path):
    def ask(items):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        run(tmp_path, [stage("sources", ask, is_strict=True)], [["a"]])


def test_local_stages_run_in_the_main_thread_and_servers_at_the_same_time(tmp_path):
    here, busy, most = set(), [0], [0]
    lock = threading.Lock()

    def remote(items):
        with lock:
            busy[0] += 1
            most[0] = max(most[0], busy[0])
        time.sleep(0.02)
        with lock:
            busy[0] -= 1
        return items

    def local(items):
        here.add(threading.current_thread())
        return items

    stages = [
        stage("sources", local),
        stage("critiques", remote, concurrency=4, batch_size=1),
        stage("edits", local),
    ]
    records = run(tmp_path, stages, [[f"{index:02}" for index in range(start, start + 8)] for start in (0, 8, 16)])
    assert here == {threading.main_thread()}
    assert 2 <= most[0] <= 4
    assert len(records["edits"]) == 24


def test_server_and_editor_work_at_the_same_time(tmp_path):
    """The first chunk is edited while the second is with the server: neither waits for the other."""
    editing, overlapped = threading.Event(), threading.Event()

    def remote(items):
        if "2" in items and editing.wait(60):
            overlapped.set()
        return items

    def local(items):
        if "1" in items:
            editing.set()
            assert overlapped.wait(60)
        return items

    stages = [stage("critiques", remote, concurrency=2, batch_size=1), stage("edits", local, batch_size=1)]
    records = run(tmp_path, stages, [["1"], ["2"]])
    assert len(records["edits"]) == 2


def test_a_server_that_goes_away_costs_only_what_was_in_flight(tmp_path):
    started = threading.Barrier(2)

    def remote(items):
        if items[0] in ("02", "03"):
            started.wait(60)
        if items[0] == "03":
            raise Unavailable("gone")
        time.sleep(0.05 if items[0] < "04" else 1)  # so slow that a busy machine sees the error long before the end
        return items

    ids = [f"{index:02}" for index in range(40)]
    with pytest.raises(Unavailable, match="gone"):
        run(tmp_path, [stage("critiques", remote, concurrency=2, batch_size=1)], [ids])
    kept = set(StageRecords(tmp_path / "critiques"))
    assert {"00", "01", "02"} <= kept
    assert "03" not in kept
    assert len(kept) < 10
    records = run(tmp_path, [stage("critiques", lambda items: items, concurrency=2)], [ids])
    assert sorted(records["critiques"]) == ids
