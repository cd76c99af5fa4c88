"""Checkpoints are whole or absent: on a full disk, on damage, on pruning."""

import errno
import json
import os
import pickle
import re
import resource
import shutil

import pytest
import torch

from rpo.training import checkpoint
from rpo.training.checkpoint import (
    checkpoint_path,
    checkpoints,
    read_part,
    remove_leftovers,
    save_checkpoint,
    verify_checkpoint,
)


def parts(value=1.0, size=1000):
    return {
        "weights.pt": {"params": [torch.full((size,), float(value))]},
        "run.json": {"update": 3},
        "own.pt": b"bytes",
    }


def save(folder, update, *, keep=2, size=1000):
    save_checkpoint(checkpoint_path(folder, update), parts(update, size), keep=keep)


def test_round_trip(tmp_path):
    save(tmp_path, 7)
    (path,) = checkpoints(tmp_path)
    assert path.name == "checkpoint-000007"
    verify_checkpoint(path)
    assert torch.equal(read_part(path, "weights.pt")["params"][0], torch.full((1000,), 7.0))
    assert read_part(path, "run.json") == {"update": 3}
    assert (path / "own.pt").read_bytes() == b"bytes"


def test_the_oldest_go_and_the_newest_stay_in_numerical_order(tmp_path):
    for update in (999_999, 1_000_000, 1_000_001):
        save(tmp_path, update, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1000000", "checkpoint-1000001"]
    assert not list(tmp_path.glob("*.tmp"))


def test_pruning_waits_until_the_new_one_is_in_place(tmp_path, monkeypatch):
    save(tmp_path, 1, keep=1)
    seen, seal = [], checkpoint._seal
    monkeypatch.setattr(checkpoint, "_seal", lambda *given: (seen.append(checkpoints(tmp_path)[0].name), seal(*given)))
    save(tmp_path, 2, keep=1)
    assert seen == ["checkpoint-000001"]
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-000002"]


def test_a_checkpoint_that_is_there_is_left_alone(tmp_path):
    save(tmp_path, 1)
    before = (tmp_path / "checkpoint-000001" / "weights.pt").stat().st_mtime_ns
    save(tmp_path, 1, size=5)
    assert (tmp_path / "checkpoint-000001" / "weights.pt").stat().st_mtime_ns == before


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(checkpoint, "_seal", fails)
    with pytest.raises(RuntimeError, match="out of luck"):
        save(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [100, 900, 2000, 100_000, 400_100])
def test_a_disk_that_takes_no_more_is_one_clear_error(tmp_path, limit):
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError) as caught:
            save(tmp_path, 2, size=100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert re.search(
        rf"could not save {tmp_path}/checkpoint-000002: File too large; \d+ bytes are free: make room, then "
        "resume from checkpoint-000001",
        str(caught.value),
    )
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000001"]
    verify_checkpoint(tmp_path / "checkpoint-000001")


def test_a_full_disk_found_only_at_sync_is_the_same_error(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device; .* are free.* resume from the start, as there is no"):
        save(tmp_path, 2)
    assert list(tmp_path.iterdir()) == []


def truncate(path):
    content = (path / "weights.pt").read_bytes()
    (path / "weights.pt").write_bytes(content[:-100])
    return rf"weights\.pt is truncated: it has {len(content) - 100} bytes; expected {len(content)}"


def tamper(path):
    content = bytearray((path / "weights.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "weights.pt").write_bytes(content)
    return r"weights\.pt was altered"


def remove_file(path):
    (path / "run.json").unlink()
    return r"run\.json is missing"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "3",
        "null",
        '"weights.pt"',
        '{"weights.pt": {"bytes": 9',
        '{"weights.pt": 9}',
        '{"weights.pt": {"bytes": 9}}',
        "\x00\x00",
        "\udce4",
    ],
)
def test_a_damaged_manifest_is_named_with_the_remedy(tmp_path, text):
    save(tmp_path, 3)
    save(tmp_path, 4)
    manifest = tmp_path / "checkpoint-000004/manifest.json"
    manifest.write_bytes(text.encode(errors="surrogateescape"))
    message = f"{manifest} is damaged; expected the sizes and sha256 .* delete the folder .* from checkpoint-000003"
    for only in (None, "run.json"):
        with pytest.raises(ValueError, match=message):
            verify_checkpoint(manifest.parent, only=only)


def test_a_manifest_that_leaves_a_file_out_is_named(tmp_path):
    save(tmp_path, 3)
    manifest = tmp_path / "checkpoint-000003/manifest.json"
    named = json.loads(manifest.read_text())
    del named["run.json"]
    manifest.write_text(json.dumps(named))
    with pytest.raises(ValueError, match=r"manifest\.json does not name run\.json; .* from the start"):
        verify_checkpoint(manifest.parent, only="run.json")


def remove_manifest(path):
    (path / "manifest.json").unlink()
    return r"has no manifest\.json"


@pytest.mark.parametrize("damage", [truncate, tamper, remove_file, remove_manifest])
def test_damage_names_the_file_and_the_way_out(tmp_path, damage):
    save(tmp_path, 1)
    save(tmp_path, 2)
    newest = checkpoints(tmp_path)[-1]
    message = damage(newest)
    with pytest.raises(ValueError, match=f"{message}.*delete the folder {newest} to continue from checkpoint-000001"):
        verify_checkpoint(newest)
    shutil.rmtree(newest)
    verify_checkpoint(checkpoints(tmp_path)[-1])


def test_damage_to_the_only_one_sends_to_the_start(tmp_path):
    save(tmp_path, 1)
    (path,) = checkpoints(tmp_path)
    tamper(path)
    with pytest.raises(ValueError, match="to continue from the start"):
        verify_checkpoint(path)


def test_half_written_ones_do_not_count_and_are_cleaned_up(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoint-000002.tmp").mkdir()
    (tmp_path / "checkpoint-000002.tmp" / "weights.pt").write_text("half")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-000001"]
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000001"]


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_reading_executes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(Evil(), tmp_path / "weights.pt")
    with pytest.raises(pickle.UnpicklingError):
        read_part(tmp_path, "weights.pt")
    assert not (tmp_path / "executed").exists()


def test_the_manifest_lists_every_file(tmp_path):
    save(tmp_path, 1)
    (path,) = checkpoints(tmp_path)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest.keys() == {"weights.pt", "run.json", "own.pt"}
    assert manifest["own.pt"] == {
        "bytes": 5,
        "sha256": "277089d91c0bdf4f2e6862ba7e4a07605119431f5d13f726dd352b06f1b206a9",
    }
