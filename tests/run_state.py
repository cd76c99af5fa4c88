"""What a run's folder holds, for comparing two runs, or one with itself before and after."""

import gc

import pytest

from rpo.files.lock import LOCK
from rpo.training.log import TIMINGS, read_metrics


def state_of(folder):
    """Every file and folder with its date and content, but for the lock files."""
    paths = [path for path in folder.rglob("*") if path.name != LOCK and path.suffix != ".lock"]
    return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in paths}


def assert_refused(folder, message, attempt):
    """What is refused says why and changes nothing."""
    gc.collect()  # a trainer of before closes its caches when it goes
    before = state_of(folder)
    with pytest.raises(ValueError, match=message):
        attempt()
    after = state_of(folder)
    changed = [str(path) for path in before | after if before.get(path) != after.get(path)]
    assert not changed, changed


def metrics_of(folder):
    """The logged lines, times aside."""
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in read_metrics(folder)]


def result_of(folder):
    """What two equal runs have in common: LoRAs, records, pairs, images, metrics; by path within the folder."""
    kept = [
        path
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in (".safetensors", ".jsonl", ".png", ".parquet")
    ]
    found = {}
    for path in kept:
        name = path.relative_to(folder).as_posix()
        if path.name == "metrics.jsonl":
            found[name] = metrics_of(path.parent)
        elif path.name != "stages.jsonl":
            found[name] = sorted(path.read_bytes().splitlines()) if path.suffix == ".jsonl" else path.read_bytes()
    return found
