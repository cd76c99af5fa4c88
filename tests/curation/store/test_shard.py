"""The records of a stage: lines of many processes read as one, killed at any byte, and what many of them cost."""

import errno
import json
import threading
import tracemalloc
from array import array

import numpy as np
import pytest
from rpo.curation.store.shards import Places, StageRecords, key_of

from rpo.curation.store import shards
from tests.opens import Counted


def test_records_are_the_union_of_all_parts(tmp_path):
    first, second = StageRecords(tmp_path, 0), StageRecords(tmp_path, 1)
    first.append({"id": "a", "value": 1})
    second.append({"id": "b", "value": 2})
    both = StageRecords(tmp_path)
    assert len(both) == 2
    assert "a" in both
    assert both["b"] == {"id": "b", "value": 2}
    assert both.get("c") is None
    assert sorted(both) == ["a", "b"]


def test_a_half_written_last_line_is_cut_off_in_the_own_part_and_passed_over_in_others(tmp_path):
    StageRecords(tmp_path, 0).append({"id": "a"})
    path = tmp_path / "part-0.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"id": "b", "val')
    assert sorted(StageRecords(tmp_path)) == ["a"]
    assert sorted(StageRecords(tmp_path, 1)) == ["a"]
    assert path.read_bytes() != whole
    mended = StageRecords(tmp_path, 0)
    assert path.read_bytes() == whole
    mended.append({"id": "b"})
    assert sorted(StageRecords(tmp_path)) == ["a", "b"]


def test_a_line_that_was_cut_in_the_middle_of_a_file_is_named(tmp_path):
    (tmp_path / "part-0.jsonl").write_text('{"id": "a"}\n{"id": "b", \n{"id": "c"}\n')
    with pytest.raises(ValueError, match=rf"^{tmp_path.name}/part-0.jsonl:2: not JSON"):
        StageRecords(tmp_path)


def test_a_line_without_id_is_named(tmp_path):
    (tmp_path / "part-0.jsonl").write_text('{"id": 3}\n')
    with pytest.raises(ValueError, match="a line has the id 3; expected text; mend or remove the line"):
        StageRecords(tmp_path)


def test_a_record_is_recorded_once_and_only_by_writers(tmp_path):
    records = StageRecords(tmp_path, 0)
    records.append({"id": "a"})
    with pytest.raises(ValueError, match="has record a already"):
        records.append({"id": "a"})
    with pytest.raises(ValueError, match="opened for reading"):
        StageRecords(tmp_path).append({"id": "b"})


def test_many_threads_append_whole_lines(tmp_path):
    records = StageRecords(tmp_path, 0)
    rows = [{"id": f"{index:04}", "text": "x" * index} for index in range(80)]
    threads = [threading.Thread(target=lambda k=k: [records.append(row) for row in rows[k::8]]) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [records[row["id"]] for row in rows] == rows
    assert [StageRecords(tmp_path)[row["id"]] for row in rows] == rows


def test_a_full_disk_leaves_no_half_line_behind(tmp_path, monkeypatch):
    records = StageRecords(tmp_path, 0)
    records.append({"id": "a"})

    def full(path, row):
        with path.open("ab") as file:
            file.write(json.dumps(row).encode()[:5])
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "append_line", full)
        with pytest.raises(OSError, match="no space left"):
            records.append({"id": "b"})
    records.append({"id": "c"})
    assert (tmp_path / "part-0.jsonl").read_text() == '{"id": "a"}\n{"id": "c"}\n'
    assert "b" not in records


COUNT = 20_000


def name_of(number):
    return f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}"


def lines(path, numbers, **columns):
    path.parent.mkdir(exist_ok=True)
    rows = ({"id": name_of(number), "order": number, "text": "word " * 20, **columns} for number in numbers)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def long_stage(tmp_path):
    for part in range(3):
        lines(tmp_path / "sources" / f"part-{part}.jsonl", range(part, COUNT, 3))
    return tmp_path / "sources"


def test_a_record_takes_16_bytes(long_stage):
    StageRecords(long_stage)  # what is imported and cached by then
    tracemalloc.start()
    records = StageRecords(long_stage)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(records) == COUNT
    assert held < 24 * COUNT


def test_records_that_are_added_are_sorted_in(monkeypatch):
    monkeypatch.setattr("rpo.curation.store.shards._FEW", 10)
    places = Places(array("Q", [5, 3, 5]), array("Q", [50, 30, 51]))
    expected = {5: 50, 3: 30}
    for key in np.random.default_rng(0).integers(0, 2**63, 500).tolist():
        places.add(key * 2, key)
        expected[key * 2] = key
        assert len(places) == len(expected)
    assert all(places.get(key) == place for key, place in expected.items())
    assert places.get(4) is None and places.get(2**64 - 1) is None and places.get(1) is None
    assert key_of("00000000000000ff") == 255 and key_of("ff") != 255 and key_of("00000000000000FF") != 255


def test_looks_open_a_file_once(long_stage, monkeypatch):
    records = StageRecords(long_stage)
    counted = Counted(monkeypatch)
    for number in range(0, 3000, 2):
        assert records[name_of(number)]["order"] == number
    assert counted.opened == {f"part-{part}.jsonl": 1 for part in range(3)}
    assert counted.parsed == 1500


def test_a_pass_over_everything_opens_and_reads_each_file_once(long_stage, monkeypatch):
    records = StageRecords(long_stage)
    counted = Counted(monkeypatch)
    assert sum(1 for _ in records.rows()) == COUNT
    assert counted.opened == {f"part-{part}.jsonl": 1 for part in range(3)} and counted.parsed == COUNT


def test_the_order_of_a_plan_is_found_with_few_bytes(long_stage):
    records = StageRecords(long_stage)
    assert [row["order"] for row in records.in_order("order")] == list(range(COUNT))
    tracemalloc.start()
    first = next(records.in_order("order"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert first["order"] == 0 and peak < 100 * COUNT


def test_more_parts_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_FILES", 2)
    for part in range(7):
        lines(tmp_path / "s" / f"part-{part}.jsonl", range(part, 70, 7))
    records = StageRecords(tmp_path / "s")
    assert [records[name_of(number)]["order"] for number in range(70)] == list(range(70))


def test_a_line_longer_than_a_block_and_a_line_cut_off_after_a_look(tmp_path):
    records = StageRecords(tmp_path / "s", 0)
    rows = [{"id": name_of(number), "text": "é" * size} for number, size in enumerate([1, 4094, 4096, 20_000, 3])]
    for row in rows:
        records.append(row)
    assert [records[row["id"]] for row in rows] == rows == list(records.rows())


def test_what_another_process_writes_later_is_not_half_seen(tmp_path):
    lines(tmp_path / "s" / "part-1.jsonl", range(3))
    records = StageRecords(tmp_path / "s")
    with (tmp_path / "s" / "part-1.jsonl").open("a") as file:
        file.write(json.dumps({"id": name_of(3), "order": 3}) + "\n")
    assert sorted(records) == sorted(map(name_of, range(3)))
    assert [row["order"] for row in records.in_order("order")] == [0, 1, 2]
