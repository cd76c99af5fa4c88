"""Killed at any moment and called again, a run ends as one that was left alone: line for line, export for export."""

import multiprocessing
import os
import random
import signal
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from rpo.curation import curate as curate_module
from rpo.curation.curate import curate
from rpo.curation.export import export
from rpo.curation.store import shards as parts
from rpo.curation.store.folder import STAGES, RunFolder
from rpo.curation.store.progress import Progress
from rpo.data.readers import read_pairs
from rpo.files.whole import append_line
from tests.curation.fakes import (
    FakeCritic,
    FakeEditor,
    FakeInstructor,
    Hook,
    config_of,
    fakes,
    finished,
    image_folder,
    in_child,
    lines_of,
    threaded,
)

COUNT = 30


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("source"), COUNT)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, source):
    return finished(config_of(tmp_path_factory.mktemp("undisturbed") / "run", source))


def images_of(folder):
    return {path.name: path.read_bytes() for path in (folder / "images").glob("*.png")}


@pytest.mark.parametrize(
    ("component", "at"), [("critic", 1), ("critic", 7), ("instructor", 5), ("editor", 2), ("editor", 4)]
)
def test_in_a_component(undisturbed, source, tmp_path, component, at):
    config = config_of(tmp_path / "run", source)
    kinds = {"critic": FakeCritic, "instructor": FakeInstructor, "editor": FakeEditor}
    killed = fakes(**{component: kinds[component](before=Hook(at))})
    assert in_child(partial(curate, config, components=killed)) == [-9]
    assert lines_of(tmp_path / "run") != lines_of(undisturbed.path)
    curate(config, resume=True, components=fakes())
    assert lines_of(tmp_path / "run") == lines_of(undisturbed.path)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("moment", ["before", "half", "after"])
@pytest.mark.parametrize("stage", STAGES)
def test_while_a_line_is_written(undisturbed, source, tmp_path, monkeypatch, stage, moment):
    at = max(len(undisturbed.stages[stage]) // 2, 2)
    written = []

    def append_and_die(path: Path, row):
        written.append(path.parent.name)
        is_last = written.count(stage) == at and path.parent.name == stage
        if is_last and moment == "half":
            append_line(path, row)
            os.truncate(path, path.stat().st_size - 17)
        elif not is_last or moment == "after":
            append_line(path, row)
        if is_last:
            die()

    config = config_of(tmp_path / "run", source)
    with monkeypatch.context() as patch:
        patch.setattr(parts, "append_line", append_and_die)
        assert in_child(partial(curate, config, components=fakes())) == [-9]
    found = RunFolder(config.output).stages[stage]
    assert len(found) == (at if moment == "after" else at - 1), "all but the line that was being written"
    is_torn = not (tmp_path / "run" / stage / "part-0.jsonl").read_bytes().endswith(b"\n")
    assert is_torn == (moment == "half")
    curate(config, resume=True, components=fakes())
    assert lines_of(tmp_path / "run") == lines_of(undisturbed.path)


@pytest.mark.parametrize("at", [1, 9, 36])
@pytest.mark.parametrize("is_in_place", [False, True])
def test_while_an_image_is_stored(undisturbed, source, tmp_path, monkeypatch, at, is_in_place):
    """Sources and edits: a part of an image is never taken for one, and one without a line is stored once."""
    calls = []
    real = Path.replace

    def replace_and_die(self, target):
        if Path(target).parent.name == "images":
            calls.append(target)
            if len(calls) == at and not is_in_place:
                die()
        real(self, target)
        if len(calls) == at:
            die()

    config = config_of(tmp_path / "run", source)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace_and_die)
        assert in_child(partial(curate, config, components=fakes())) == [-9]
    assert len(images_of(tmp_path / "run")) == at - (not is_in_place)
    curate(config, resume=True, components=fakes())
    assert lines_of(tmp_path / "run") == lines_of(undisturbed.path)
    assert images_of(tmp_path / "run") == images_of(undisturbed.path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("stage", STAGES)
def test_a_file_that_ends_in_the_middle_of_a_line_is_gone_on_with(undisturbed, source, tmp_path, stage, share):
    config = config_of(tmp_path / "run", source)
    curate(config, components=fakes())
    path = tmp_path / "run" / stage / "part-0.jsonl"
    whole = path.read_bytes()
    cut = whole[: max(int(len(whole) * share), 5)]
    assert not cut.endswith(b"\n")
    path.write_bytes(cut)
    num_whole = cut.count(b"\n")
    assert len(RunFolder(config.output).stages[stage]) == num_whole, "the torn line does not count"
    curate(config, resume=True, components=fakes())
    assert path.read_bytes()[: cut.rfind(b"\n") + 1] == whole[: cut.rfind(b"\n") + 1], "what was whole stays"
    assert lines_of(tmp_path / "run") == lines_of(undisturbed.path)


class AtWork:
    """Which stages a process is at work in, to be read after its death."""

    def __init__(self):
        self.counts = multiprocessing.get_context("fork").Array("i", len(STAGES), lock=False)

    def names(self):
        return {stage for stage, count in zip(STAGES, self.counts, strict=True) if count > 0}

    def clear(self):
        self.counts[:] = [0] * len(STAGES)


def under_watch(monkeypatch, at_work, *, line_seconds):
    """Note what is at work, and make every line take its time, so that all stages are killed in and not the slowest."""
    real = Progress.batch

    @contextmanager
    def batch(self, stage):
        at_work.counts[STAGES.index(stage)] += 1
        with real(self, stage):
            yield
        at_work.counts[STAGES.index(stage)] -= 1

    def append_slowly(path, row):
        time.sleep(line_seconds)
        append_line(path, row)

    monkeypatch.setattr(curate_module.Progress, "batch", batch)
    monkeypatch.setattr(parts, "append_line", append_slowly)


def kill_at_random(config, make, at_work, *, times, seconds, stages=()):
    """Kill a run at random times until it was killed often enough, and in these stages; what it was killed in.

    A run that comes to its end before loses the end of every file, in the middle of a line, and goes on.
    """
    chance = random.Random(0)
    kills: list[set[str]] = []
    while len(kills) < times or not set(stages) <= set().union(*kills):
        assert len(kills) < 10 * times, set().union(*kills)
        at_work.clear()
        run = partial(curate, config, resume=True, components=make())
        (code,) = in_child(run, kill_after=chance.uniform(0.1, 1) * seconds)
        assert code in (0, -9)
        if code == -9:
            kills.append(at_work.names())
            continue
        for stage in STAGES:
            for part in Path(config.output).glob(f"{stage}/part-*"):
                data = part.read_bytes()
                part.write_bytes(data[: chance.randrange(len(data))])
    return kills


def require_same_exports(folder, other):
    """Native and Pick-a-Pic exports of two runs hold the same records, in the same order."""
    for form in ("native", "pickapic"):
        one, two = (export(path, form).path for path in (folder, other))
        files = [sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file()) for root in (one, two)]
        assert files[0] == files[1]
        for path in files[0]:
            if path.name != "README.md":  # the card has the name of the run
                assert (one / path).read_bytes() == (two / path).read_bytes(), path
        assert len(read_pairs(one)) == len(read_pairs(two)) > 0


def test_at_random_times(undisturbed, source, tmp_path, monkeypatch):
    config = config_of(tmp_path / "run", source)
    with monkeypatch.context() as patch:
        under_watch(patch, at_work := AtWork(), line_seconds=0.001)
        assert len(kill_at_random(config, threaded, at_work, times=3, seconds=0.3)) == 3
    curate(config, resume=True, components=fakes())
    assert lines_of(tmp_path / "run") == lines_of(undisturbed.path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("make", [fakes, threaded])
def test_often_and_under_load_in_every_stage(tmp_path, monkeypatch, make):
    source = image_folder(tmp_path / "source", 150)
    undisturbed = finished(config_of(tmp_path / "undisturbed" / "run", source))
    at_work = AtWork()
    config = config_of(tmp_path / "killed" / "run", source)
    with monkeypatch.context() as patch:
        under_watch(patch, at_work, line_seconds=0.002)
        kills = kill_at_random(config, make, at_work, times=30, seconds=1.5, stages=STAGES)
    assert len(kills) >= 30 and set().union(*kills) == set(STAGES)
    curate(config, resume=True, components=make())
    assert lines_of(tmp_path / "killed" / "run") == lines_of(undisturbed.path)
    require_same_exports(tmp_path / "killed" / "run", undisturbed.path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_that_are_killed_again_and_again(tmp_path, monkeypatch):
    source = image_folder(tmp_path / "source", 80)
    undisturbed = finished(config_of(tmp_path / "undisturbed" / "run", source))
    config = config_of(tmp_path / "killed" / "run", source)
    shares = [replace(config, part=f"{part}/2") for part in range(2)]
    chance = random.Random(1)
    codes: list[int | None] = []
    with monkeypatch.context() as patch:
        under_watch(patch, AtWork(), line_seconds=0.03)
        for _ in range(12):
            runs = [partial(curate, share, resume=True, components=threaded()) for share in shares]
            codes += in_child(*runs, kill_after=chance.uniform(0.1, 0.4))
    assert codes.count(-9) >= 12 and set(codes) <= {0, -9}
    for share in shares:
        curate(share, resume=True, components=fakes())
    assert lines_of(tmp_path / "killed" / "run") == lines_of(undisturbed.path)
    require_same_exports(tmp_path / "killed" / "run", undisturbed.path)
