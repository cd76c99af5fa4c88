"""A checkpoint of tensors that processes have parts of: no process has a whole one, and any number reads them."""

import errno
import json
import re
import resource

import pytest
import torch
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from rpo.training.checkpoint import MANIFEST, checkpoint_path, checkpoints, verify_checkpoint
from rpo.training.divided import PARTS, apart, put_back
from rpo.training.loop_config import LoopConfig
from rpo.training.processes import Processes
from rpo.training.session import Session
from tests.forked import together

SHAPES = ((5, 3), (1, 4), (7,), (64, 8))
"""Of parameters, some of which have fewer rows than there are processes."""


def toy(folder, *, offset=0.0, shapes=SHAPES):
    """A session of whole parameters on one process, of divided ones on several."""
    processes = Processes()
    values = [torch.arange(torch.Size(one).numel()).reshape(one) + 100 * i + offset for i, one in enumerate(shapes)]
    if processes.count > 1:
        mesh = init_device_mesh("cpu", (processes.count,))
        values = [distribute_tensor(one, mesh, [Shard(0)], src_data_rank=None) for one in values]
    params = [torch.nn.Parameter(one) for one in values]
    loop = LoopConfig(updates=9, ema_decay=0.5, progress=False)
    return Session(params, loop, folder, processes, objects={}, identity={})


def step(session):
    for param in session.state.params:
        param.grad = param.detach().cos()
    session.state.commit(learning_rate=0.1, is_finite=True, samples=1, metrics={}, seconds=0.0)


def whole(session):
    """Parameters, averages and moments, as this process would have them alone."""
    state = session.state
    moments = [value for one in state.optimizer.state.values() for value in one.values()]
    return [
        (one.full_tensor() if hasattr(one, "full_tensor") else one).detach().clone()
        for one in (*state.params, *state.ema.averages, *moments)
    ]


def saved(folder, *, updates=2):
    session = toy(folder)
    session.start()
    for _ in range(updates):
        step(session)
    session.save()
    return whole(session)


def gone_on(folder):
    session = toy(folder, offset=0.25)
    session.start()
    found = whole(session)
    step(session)
    return found, whole(session)


def test_three_processes_read_what_two_have_written_and_one_what_they_have(tmp_path):
    folder = tmp_path / "run"
    two = together(2, tmp_path / "two", saved, folder)[0]
    three = together(3, tmp_path / "three", gone_on, folder)
    alone, after = gone_on(folder)
    expected, expected_after = saved(tmp_path / "alone"), saved(tmp_path / "longer", updates=3)
    for found in (two, three[0][0], three[2][0], alone):
        assert all(map(torch.equal, found, expected))
    for found in (three[1][1], after):
        assert all(map(torch.equal, found, expected_after))


def test_every_process_writes_its_own_part_and_no_more(tmp_path):
    together(2, tmp_path / "two", saved, tmp_path / "run")
    path = checkpoint_path(tmp_path / "run", 2)
    verify_checkpoint(path)
    rows = []
    for file in sorted((path / PARTS).iterdir()):
        with safe_open(file, "pt") as parts:
            rows.append(parts.get_slice("weights.pt/params/3").get_shape()[0])
    assert rows == [32, 32]
    named = json.loads((path / MANIFEST).read_text())
    assert sorted(named) == sorted(
        file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file() and file.name != MANIFEST
    )


def saved_twice(folder):
    saved(folder)
    path = checkpoint_path(folder, 2)
    before = [file.stat().st_mtime_ns for file in sorted((path / PARTS).iterdir())]
    session = toy(folder)
    session.start()
    session.save()
    return before, [file.stat().st_mtime_ns for file in sorted((path / PARTS).iterdir())]


def of_other_sizes(folder):
    with pytest.raises(ValueError, match=r"params\[0\] of shape \(5, 3\), this run's has \(6, 3\)"):
        toy(folder, shapes=((6, 3), *SHAPES[1:])).start()


def of_a_damaged_file(folder):
    with pytest.raises(ValueError, match=r"divided/shard.* was altered; expected .*delete the folder"):
        toy(folder).start()


def on_a_full_disk(folder):
    session = toy(folder)
    session.start()
    step(session)
    session.save()
    step(session)
    if session.processes.index == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.raises(OSError) as caught:
        session.save()
    assert caught.value.errno == errno.EFBIG
    assert re.search("could not save .*000002: File too large.*resume from checkpoint-000001", str(caught.value))


def test_a_checkpoint_that_is_there_is_left_alone(tmp_path):
    for before, after in together(2, tmp_path / "answers", saved_twice, tmp_path / "run"):
        assert before == after


def test_what_does_not_fit_or_is_damaged_is_told_on_every_process(tmp_path):
    folder = tmp_path / "run"
    together(2, tmp_path / "two", saved, folder)
    together(2, tmp_path / "other", of_other_sizes, folder)
    file = min((checkpoint_path(folder, 2) / PARTS).iterdir())
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    together(3, tmp_path / "damaged", of_a_damaged_file, folder)


def test_a_disk_that_takes_no_more_of_one_process_is_one_clear_error_on_all(tmp_path):
    together(2, tmp_path / "answers", on_a_full_disk, tmp_path / "run")
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-000001"]
    assert not list((tmp_path / "run").glob("*.tmp"))
    verify_checkpoint(checkpoint_path(tmp_path / "run", 1))


def divided(folder):
    mesh = init_device_mesh("cpu", (Processes().count,))
    tensors = [distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]) for _ in range(2)]
    files = {"a": {"b": [tensors[0], 3, None]}, "c": {"state": {0: {"x": tensors[1], "step": torch.ones(())}}}}
    rest, found = apart(files)
    assert rest == {"a": {"b": [None, 3, None]}, "c": {"state": {0: {"x": None, "step": torch.ones(())}}}}
    assert found == {"a/b/0": tensors[0], "c/state/0/x": tensors[1]}
    put_back(rest, found)
    assert rest["a"]["b"][0] is tensors[0] and rest["c"]["state"][0]["x"] is tensors[1]
    assert files["a"]["b"][0] is tensors[0]


def test_what_is_taken_apart_is_put_back(tmp_path):
    together(2, tmp_path / "answers", divided, tmp_path)
