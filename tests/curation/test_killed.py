"""Killed at any moment and called again, a run ends as one left alone: record for record, export for export."""

import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from rpo.curation.curate import curate
from rpo.curation.engines import local
from rpo.curation.export import export
from rpo.curation.records import Unavailable, histories
from rpo.curation.store.address import Store
from rpo.curation.store.mark import STAGES
from rpo.curation.store.run import CurationRun
from rpo.data.readers import read_pairs
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
    named,
    sealed,
    threaded,
)

COUNT = 30
SHARDS = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("source"), COUNT)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, source):
    return finished(config_of(tmp_path_factory.mktemp("undisturbed") / "run", source)).store.address


@pytest.fixture
def forked(monkeypatch):
    """Workers that are forked: they start at once, and take components that cannot be pickled."""
    monkeypatch.setattr(local, "START", "fork")
    monkeypatch.setattr(local, "require_shareable", lambda job: None)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("component", "at"), [("critic", 1), ("critic", 7), ("instructor", 5), ("editor", 4)])
def test_in_a_component(undisturbed, source, tmp_path, component, at):
    config = config_of(tmp_path / "run", source)
    kinds = {"critic": FakeCritic, "instructor": FakeInstructor, "editor": FakeEditor}
    killed = fakes(**{component: kinds[component](before=Hook(at))})
    assert in_child(partial(curate, config, components=killed)) == [-9]
    curate(config, resume=True, components=fakes())
    assert lines_of(tmp_path / "run") == lines_of(undisturbed)


MOMENTS = [(what, moment) for what in ("manifest.json", ".parquet", "2.json") for moment in ("before", "half", "after")]


@pytest.mark.parametrize(("what", "moment"), [one for one in MOMENTS if one != ("manifest.json", "half")])
def test_while_a_file_is_written(undisturbed, source, tmp_path, monkeypatch, what, moment):
    """Half a file is what a disk leaves that renames before it has written; half a manifest is told."""
    real, written = Store.write, []

    def write_and_die(self, name, data):
        is_last = name.endswith(what)
        written.append(is_last)
        is_last = sum(written) == (3 if what == ".parquet" else 1) and is_last
        if not is_last or moment != "before":
            real(self, name, data[: len(data) // 2] if is_last and moment == "half" else data)
        if is_last:
            die()

    config = config_of(tmp_path / "run", source)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", write_and_die)
        assert in_child(partial(curate, config, components=fakes())) == [-9]
    curate(config, resume=True, components=fakes())
    assert lines_of(tmp_path / "run") == lines_of(undisturbed)
    require_same_shards(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("what", ["manifest.json", ".parquet", "2.json"])
def test_the_next_call_sweeps_what_a_killed_one_was_writing(undisturbed, source, tmp_path, monkeypatch, what):
    def write_and_die(self, data):
        real(self, data[: len(data) // 2])
        if f"{what}." in self.name:
            die()
        real(self, data)

    real, config = Path.write_bytes, config_of(tmp_path / "run", source)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_and_die)
        assert in_child(partial(curate, config, components=fakes())) == [-9]
    assert len(list((tmp_path / "run").rglob("*.partial"))) == 1
    curate(config, resume=True, components=fakes())
    assert list((tmp_path / "run").rglob("*.partial")) == []
    require_same_shards(tmp_path / "run", undisturbed)


def require_same_shards(folder, other):
    """The same files, byte for byte, but for when they were made: nothing is lost, doubled or left behind."""
    found = []
    for path in (folder, other):
        marks = [json.loads(Store(path).read(f"shards/{number:07}.json")) for number in sealed(path)]
        found.append([(mark["file"], mark["sha256"], mark["stages"], mark["start"]) for mark in marks])
    assert found[0] == found[1]


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


class Slow:
    """Makes a component take its time, so that kills find a run at work."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __call__(self):
        time.sleep(self.seconds)


def slow(make, seconds):
    before = Slow(seconds)
    found = make()
    for component in (found.critic, found.instructor, found.editor):
        component.before = before
    return found


def kill_at_random(config, make, *, times, seconds):
    """Kill a run at random times, often enough; one that comes to its end before loses half of its marks."""
    chance, kills = random.Random(0), 0
    while kills < times:
        run = partial(curate, config, resume=True, components=slow(make, 0.003))
        (code,) = in_child(run, kill_after=chance.uniform(0.1, 1) * seconds)
        assert code in (0, -9)
        kills += code == -9
        if code == 0:
            for number in chance.sample(sealed(config.output), k=len(sealed(config.output)) // 2):
                Store(config.output).remove(f"shards/{number:07}.json")


@pytest.mark.parametrize("make", [fakes, threaded])
def test_at_random_times(undisturbed, source, tmp_path, make):
    config = config_of(tmp_path / "run", source)
    kill_at_random(config, make, times=2, seconds=0.2)
    curate(config, resume=True, components=make())
    assert lines_of(tmp_path / "run") == lines_of(undisturbed)
    require_same_shards(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("workers", [2, 3])
def test_several_workers_give_the_same(undisturbed, source, tmp_path, forked, workers):
    config = config_of(tmp_path / "run", source, workers=workers)
    curate(config, components=threaded() if workers == 2 else fakes())
    assert lines_of(tmp_path / "run") == lines_of(undisturbed)
    require_same_shards(tmp_path / "run", undisturbed)


def test_a_worker_that_dies_ends_the_run_and_the_others(undisturbed, source, tmp_path, forked):
    config = config_of(tmp_path / "run", source, workers=2)
    before = set(multiprocessing.active_children())
    with pytest.raises(Unavailable, match="a worker process died"):
        curate(config, components=fakes(editor=FakeEditor(before=die)))
    assert set(multiprocessing.active_children()) == before
    curate(config, resume=True, components=fakes())
    assert lines_of(tmp_path / "run") == lines_of(undisturbed)


def test_workers_end_with_the_process_that_started_them(undisturbed, source, tmp_path, forked):
    config, pids = config_of(tmp_path / "run", source, workers=2), tmp_path / "pids"
    pids.mkdir()

    def note_and_wait():
        (pids / str(os.getpid())).touch()
        time.sleep(60)

    run = partial(curate, config, components=fakes(critic=FakeCritic(before=note_and_wait)))
    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    until(lambda: len(list(pids.iterdir())) == 2)
    child.kill()
    child.join()
    until(lambda: not any(is_alive(int(path.name)) for path in pids.iterdir()))
    curate(config, resume=True, components=fakes())
    assert lines_of(tmp_path / "run") == lines_of(undisturbed)


def until(holds):
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_workers_that_are_not_forked(undisturbed, source, tmp_path):
    curate(named(config_of(tmp_path / "run", source, workers=2)))
    assert lines_of(tmp_path / "run") == lines_of(undisturbed)
    require_same_shards(tmp_path / "run", undisturbed)


def test_workers_see_a_common_place_and_components_that_can_be_handed_over(source, tmp_path):
    config = config_of("memory://nowhere", source, workers=2)
    with pytest.raises(ValueError, match="who cannot see each other's memory; expected a place that all see"):
        curate(config, components=fakes())
    with pytest.raises(ValueError, match="cannot be handed to 2 workers .*; name what makes it as package.module"):
        curate(replace(config, output=str(tmp_path / "run")), components=fakes())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("make", "workers"), [(fakes, 1), (threaded, 1), (threaded, 2)])
def test_twenty_times(tmp_path, forked, make, workers):
    source = image_folder(tmp_path / "source", 150)
    undisturbed = finished(config_of(tmp_path / "undisturbed" / "run", source)).store.address
    config = config_of(tmp_path / "killed" / "run", source, workers=workers)
    kill_at_random(config, make, times=20, seconds=1.5)
    curate(config, resume=True, components=make())
    assert lines_of(tmp_path / "killed" / "run") == lines_of(undisturbed)
    require_same_shards(tmp_path / "killed" / "run", undisturbed)
    require_same_exports(tmp_path / "killed" / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_that_are_killed_again_and_again(tmp_path):
    source = image_folder(tmp_path / "source", 80)
    undisturbed = finished(config_of(tmp_path / "undisturbed" / "run", source)).store.address
    config = config_of(tmp_path / "killed" / "run", source)
    shares = [replace(config, shards=f"{share}/2") for share in range(2)]
    chance = random.Random(1)
    codes: list[int | None] = []
    while codes.count(-9) < 20:
        runs = [partial(curate, share, resume=True, components=slow(threaded, 0.02)) for share in shares]
        codes += in_child(*runs, kill_after=chance.uniform(0.1, 0.4))
    assert set(codes) <= {0, -9}
    for share in shares:
        curate(share, resume=True, components=fakes())
    assert lines_of(tmp_path / "killed" / "run") == lines_of(undisturbed)
    require_same_exports(tmp_path / "killed" / "run", undisturbed)


def test_two_that_do_the_same_shards_do_no_harm(undisturbed, source, tmp_path):
    config = config_of(tmp_path / "run", source)
    runs = [partial(curate, config, resume=True, components=slow(make, 0.005)) for make in (fakes, threaded)]
    assert in_child(*runs) == [0, 0]
    assert lines_of(tmp_path / "run") == lines_of(undisturbed)
    require_same_shards(tmp_path / "run", undisturbed)


def test_who_reads_a_run_at_work_reads_what_was_sealed_last(undisturbed, source, tmp_path):
    config = config_of(tmp_path / "run", source)
    curate(replace(config, stop_after="instructions"), components=fakes())
    run = CurationRun(config.output)
    records = histories(run)
    first = next(records).source
    data = run.image_bytes(first.image, first.order, first.id)
    curate(config, resume=True, components=fakes())  # each shard is sealed anew, and its old file is gone
    rest = list(records)
    assert lines_of(tmp_path / "run") == lines_of(undisturbed)
    ends = list(histories(CurationRun(undisturbed)))[1:]
    assert rest == [replace(one, edit=None, scores=None, outcomes=None) for one in ends]  # begun by then
    last = rest[-1].source
    assert data != run.image_bytes(last.image, last.order, last.id)


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_after_a_stage_and_killed_in_the_next(undisturbed, source, tmp_path, stage):
    config = config_of(tmp_path / "run", source)
    curate(replace(config, stop_after=stage), components=fakes())
    killed = fakes(critic=FakeCritic(before=Hook(2)), editor=FakeEditor(before=Hook(2)))
    in_child(partial(curate, config, resume=True, components=killed))
    curate(config, resume=True, components=fakes())
    assert lines_of(tmp_path / "run") == lines_of(undisturbed)
