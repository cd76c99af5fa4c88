import errno
import multiprocessing
import os
import random
import signal
import sqlite3
import threading
import time

import pytest
import torch

from rpo.data.store import TensorStore


@pytest.fixture
def store(tmp_path):
    opened = TensorStore(tmp_path / "some" / "store.sqlite")
    yield opened
    opened.close()


@pytest.mark.parametrize("shape", [(3, 4, 5), (), (2,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_come_back_to_the_bit(store, dtype, shape):
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    given = whole.permute(tuple(reversed(range(whole.ndim))))  # not contiguous
    store.save({b"k": given})
    (loaded,) = store.load([b"k"]).values()
    assert loaded.dtype == dtype
    assert torch.equal(loaded, given)


def test_integers_are_refused(store):
    with pytest.raises(ValueError, match=r"^a tensor is torch\.int64; expected torch\.float64, .*; convert it before"):
        store.save({b"k": torch.arange(3)})


def test_only_what_is_there_is_found(store):
    store.save({bytes([i]): torch.full((2,), float(i)) for i in range(5)})
    assert store.present([b"\x01", b"\x09"]) == {b"\x01"}
    assert set(store.load([b"\x09", b"\x04", b"\x02"])) == {b"\x04", b"\x02"}
    assert store.load([]) == {}


def test_more_keys_than_one_query_takes(store):
    tensors = {str(i).encode(): torch.tensor([float(i)]) for i in range(1234)}
    store.save(tensors)
    loaded = store.load(list(tensors))
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)
    assert len(store.present(list(tensors))) == 1234


def test_a_key_keeps_its_first_tensor(store):
    store.save({b"k": torch.zeros(2)})
    store.save({b"k": torch.ones(2), b"other": torch.ones(2)})
    assert torch.equal(store.load([b"k"])[b"k"], torch.zeros(2))
    assert store.present([b"other"]) == {b"other"}


def test_it_is_there_after_closing(tmp_path):
    first = TensorStore(tmp_path / "s.sqlite")
    first.save({b"k": torch.arange(3.0)})
    first.close()
    again = TensorStore(tmp_path / "s.sqlite")
    assert torch.equal(again.load([b"k"])[b"k"], torch.arange(3.0))
    again.close()


def test_a_full_disk_names_file_and_space_and_loses_nothing(store):
    store.save({b"before": torch.ones(1000)})
    (pages,) = store._connection.execute("PRAGMA page_count").fetchone()
    store._connection.execute(f"PRAGMA max_page_count={pages + 2}")  # SQLite's own way to run out of space
    with pytest.raises(OSError, match=rf"no space left for {store.path} \(\d+\.\d MiB free\); free some") as error:
        store.save({b"small": torch.ones(10), b"large": torch.ones(1_000_000)})
    assert error.value.errno == errno.ENOSPC
    assert store.present([b"before", b"small", b"large"]) == {b"before"}
    store._connection.execute("PRAGMA max_page_count=100000")
    store.save({b"small": torch.ones(10)})
    assert torch.equal(store.load([b"before"])[b"before"], torch.ones(1000))
    assert store.present([b"small"]) == {b"small"}


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "s.sqlite"
    path.write_bytes(b"this is no database, but long enough to be taken for one" * 40)
    with pytest.raises(ValueError) as error:
        TensorStore(path)
    assert str(error.value) == (
        f"{path} is damaged or no cache file (file is not a database); expected one that rpo wrote; "
        "delete the file: it will be filled again"
    )


def test_a_truncated_file_is_refused_and_not_misread(tmp_path):
    path = tmp_path / "s.sqlite"
    store = TensorStore(path)
    store.save({str(i).encode(): torch.randn(5000) for i in range(20)})
    store.close()
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=rf"^{path} is damaged"):
        TensorStore(path).load([str(i).encode() for i in range(20)])


def flip(path, at):
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 16]))


@pytest.mark.parametrize("place", ["data", "dtype", "shape"])
def test_a_flipped_bit_makes_one_entry_missing_and_keeps_the_others(tmp_path, place):
    path = tmp_path / "s.sqlite"
    tensors = {f"key-{i}".encode() * 4: torch.full((5000,), float(i)) for i in range(4)}
    store = TensorStore(path)
    store.save(tensors)
    store.close()
    content = path.read_bytes()
    at = content.index(b"key-2" * 4 + b"torch.float32" + b"5000")  # a row, its cells without anything between
    middle = content.index(tensors[b"key-2" * 4].numpy().tobytes()[:400], at) + 200
    flip(path, {"data": middle, "dtype": at + 28, "shape": at + 34}[place])
    store = TensorStore(path)
    with pytest.warns(UserWarning, match=r"1 entries are damaged and are made again"):
        found = store.load(list(tensors))
    assert sorted(found) == sorted(set(tensors) - {b"key-2" * 4})
    store.save(tensors)
    again = store.load(list(tensors))
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    store.close()


@pytest.mark.filterwarnings("ignore:.*are damaged")
def test_a_flipped_bit_anywhere_never_gives_another_tensor(tmp_path):
    path, chance = tmp_path / "s.sqlite", random.Random(0)
    tensors = {str(i).encode(): torch.randn(50) for i in range(60)}
    store = TensorStore(path)
    store.save(tensors)
    store.close()
    content = path.read_bytes()
    for at in chance.sample([place for place, byte in enumerate(content) if byte], 100):
        path.write_bytes(content)
        flip(path, at)
        try:
            store = TensorStore(path)
            found = store.load(list(tensors))
            store.close()
        except ValueError as error:
            assert "delete the file" in str(error)
        else:
            assert len(found) > 40
            assert all(torch.equal(found[key], tensors[key]) for key in found)


def test_an_empty_file_is_filled(tmp_path):
    (tmp_path / "s.sqlite").touch()
    store = TensorStore(tmp_path / "s.sqlite")
    assert store.load([b"k"]) == {}
    store.save({b"k": torch.ones(2)})
    assert torch.equal(store.load([b"k"])[b"k"], torch.ones(2))
    store.close()


def test_another_layout_is_refused(tmp_path):
    path = tmp_path / "s.sqlite"
    TensorStore(path).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version=7")
    connection.close()
    with pytest.raises(ValueError, match=rf"^{path} has layout 7; expected layout 2, of this version of rpo; delete"):
        TensorStore(path)


def write(path, name, count):
    for i in range(count):
        store = TensorStore(path)
        tensor = torch.full((1000,), float(i))
        store.save({f"{name}-{i}".encode(): tensor, f"shared-{i}".encode(): tensor[:10]})
        store.close()


def started(target, *arguments):
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def test_processes_share_one_file(tmp_path):
    path = tmp_path / "s.sqlite"
    processes = [started(write, path, name, 40) for name in "abc"]
    for process in processes:
        process.join(timeout=100)
        assert process.exitcode == 0
    store = TensorStore(path)
    keys = [f"{name}-{i}".encode() for name in ("a", "b", "c", "shared") for i in range(40)]
    assert {key: tensor[0].item() for key, tensor in store.load(keys).items()} == {
        key: float(key.split(b"-")[1]) for key in keys
    }
    store.close()


def test_many_may_open_a_new_file_at_once(tmp_path):
    ready, files = threading.Barrier(4), [tmp_path / f"{number}.sqlite" for number in range(150)]
    faults = []

    def opens():
        for file in files:
            ready.wait()
            try:
                TensorStore(file).close()
            except Exception as error:
                faults.append(error)

    threads = [threading.Thread(target=opens) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


def test_a_killed_writer_leaves_whole_tensors(tmp_path):
    path = tmp_path / "s.sqlite"
    store = TensorStore(path)
    process = started(write, path, "a", 1_000_000)
    while not store.present([b"a-100"]):
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    found = store.load([f"{name}-{i}".encode() for name in ("a", "shared") for i in range(10_000)])
    own = {key for key in found if key.startswith(b"a-")}
    assert len(own) > 100
    assert {key.replace(b"a-", b"shared-") for key in own} == found.keys() - own  # each transaction whole
    assert all(torch.equal(t, torch.full_like(t, float(key.split(b"-")[1]))) for key, t in found.items())
    store.close()


def use_in_fork(store, queue):
    try:
        store.save({b"k": torch.zeros(1)})
    except ValueError as error:
        queue.put(str(error))


def test_a_store_is_not_used_by_a_forked_process(store):
    queue = multiprocessing.get_context("fork").Queue()
    process = started(use_in_fork, store, queue)
    assert queue.get(timeout=60) == (
        f"{store.path} was opened by process {os.getpid()} and is used by process {process.pid}; "
        "expected one process, or SQLite damages the file; open it again after forking"
    )
    process.join()
