"""The pipeline: what is asked how often, in which thread, and what an error costs."""

import threading
import time
from collections import Counter

import pytest
import torch

from rpo.curation.pipeline import Pipeline, Stage
from rpo.curation.records import Fault, Unavailable
from rpo.curation.store.mark import STAGES
from rpo.curation.store.shard import Shard


class Notes:
    """An observer that counts."""

    def __init__(self):
        self.kept, self.faults, self.seconds = Counter(), Counter(), Counter()

    def took(self, stage, seconds):
        self.seconds[stage] += seconds

    def recorded(self, stage, *, is_fault):
        (self.faults if is_fault else self.kept)[stage] += 1


def stage(name, ask=lambda items: [item.upper() for item in items], **changes):
    options = {
        "batch_size": 2,
        "concurrency": 1,
        "wants": lambda shard, record: True,
        "load": lambda shard, record: record,
        "keep": lambda shard, record, item, answer: {"answer": answer},
    }
    return Stage(name, **(options | {"ask": ask} | changes))


class Sealed:
    """What shards have come to when they were sealed."""

    def __init__(self):
        self.rows, self.through, self.names = {stage: {} for stage in STAGES}, {}, STAGES

    def __call__(self, shard):
        for stage in self.names[: shard.num_through]:
            self.rows[stage] |= shard.rows[stage]
        self.through[shard.number] = shard.num_through

    def __getitem__(self, stage):
        return self.rows[stage]


def run(stages, shards, notes=None, sealed=None, answered=None):
    sealed = Sealed() if sealed is None else sealed
    sealed.names = [one.name for one in stages]
    Pipeline(stages, sealed, observer=notes, answered=answered).run(
        Shard(number, 0, ids) for number, ids in enumerate(shards)
    )
    return sealed


def test_records_go_through_all_stages():
    notes = Notes()
    stages = [stage("sources"), stage("critiques", wants=lambda shard, record: record != "b")]
    records = run(stages, [["a", "b", "c"], ["d"]], notes)
    assert [records["sources"][one]["answer"] for one in "abcd"] == ["A", "B", "C", "D"]
    assert sorted(records["critiques"]) == ["a", "c", "d"]
    assert notes.kept == {"sources": 4, "critiques": 3}
    assert notes.seconds.keys() == {"sources", "critiques"} and records.through == {0: 2, 1: 2}


def test_a_stage_that_is_through_is_not_asked_again():
    asked, sealed = [], Sealed()
    shard = Shard(0, 0, "abc")
    shard.rows["sources"] = {record: {"answer": "before"} for record in "abc"}
    shard.num_through = 1
    stages = [stage("sources", lambda items: asked.extend(items)), stage("critiques")]
    Pipeline(stages, sealed).run([shard])
    assert asked == []
    assert sealed["sources"]["c"]["answer"] == "before" and sealed["critiques"]["c"]["answer"] == "C"


def test_the_latest_stage_goes_first():
    order = []

    def ask_of(name):
        return lambda items: [order.append(name + item) or item for item in items]

    stages = [stage("sources", ask_of("s"), batch_size=1), stage("critiques", ask_of("c"), batch_size=1)]
    run(stages, [["1", "2"], ["3"], ["4"]])
    assert order == ["s1", "s2", "c1", "c2", "s3", "c3", "s4", "c4"]


def test_one_item_that_raises_is_alone_at_fault():
    def ask(items):
        if "b" in items:
            raise RuntimeError("no b, please")
        return [item.upper() for item in items]

    records = run([stage("sources", ask, batch_size=4)], [["a", "b", "c"]])
    assert [records["sources"][one].get("answer") for one in "abc"] == ["A", None, "C"]
    assert records["sources"]["b"]["fault"] == {"kind": "raised", "message": "RuntimeError: no b, please", "raw": ""}


def test_a_fault_is_recorded_and_what_keep_refuses_is_one():
    notes = Notes()
    keep = lambda shard, record, item, answer: Fault("invalid", "not so") if record == "b" else {"answer": answer}  # noqa: E731
    ask = lambda items: [Fault("parse_error", "no JSON", "prose") if one == "a" else one for one in items]  # noqa: E731
    records = run([stage("critiques", ask, keep=keep)], [["a", "b", "c"]], notes)
    assert records["critiques"]["a"]["fault"]["raw"] == "prose"
    assert records["critiques"]["b"]["fault"]["kind"] == "invalid"
    assert notes.faults == {"critiques": 2}


@pytest.mark.parametrize(
    "error", [Unavailable("gone"), MemoryError(), OSError(28, "no space"), torch.AcceleratorError("device-side assert")]
)
def test_what_is_not_the_items_fault_stops_the_run_and_is_not_recorded(error):
    def ask(items):
        if "c" in items:
            raise error
        return items

    sealed = Sealed()
    with pytest.raises(type(error)):
        run([stage("sources"), stage("critiques", ask)], [["a", "b"], ["c", "d"]], sealed=sealed)
    assert sealed.through == {0: 2, 1: 1}, "what stages are through with is kept"


def test_a_strict_stage_raises():
    def ask(items):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        run([stage("sources", ask, is_strict=True)], [["a"]])


def test_local_stages_run_in_the_main_thread_and_servers_at_the_same_time():
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
    records = run(stages, [[f"{index:02}" for index in range(start, start + 8)] for start in (0, 8, 16)])
    assert here == {threading.main_thread()}
    assert 2 <= most[0] <= 4
    assert len(records["edits"]) == 24


def test_server_and_editor_work_at_the_same_time():
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
    records = run(stages, [["1"], ["2"]])
    assert len(records["edits"]) == 2


def test_a_server_that_goes_away_costs_only_what_was_in_flight():
    started = threading.Barrier(2)

    def remote(items):
        if items[0] in ("02", "03"):
            started.wait(60)
        if items[0] == "03":
            raise Unavailable("gone")
        time.sleep(0.05 if items[0] < "04" else 1)  # so slow that a busy machine sees the error long before the end
        return items

    shards = [[f"{place:02}"] for place in range(40)]
    sealed = Sealed()
    with pytest.raises(Unavailable, match="gone"):
        run([stage("critiques", remote, concurrency=2, batch_size=1)], shards, sealed=sealed)
    kept = set(sealed["critiques"])
    assert {"00", "01"} <= kept
    assert "03" not in kept
    assert len(kept) < 10
