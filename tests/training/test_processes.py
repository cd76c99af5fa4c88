"""Two processes with half the micro-batch each make the update of one with the whole. As a module: one of the two."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from accelerate.utils import DistributedType

from rpo.training import checkpoint
from rpo.training.log import read_metrics
from rpo.training.loop import LoopConfig, NonFiniteLossError, fit
from rpo.training.processes import Processes, check_kind
from rpo.types import StepOutput
from tests.training.toy import names, plain_loss, toy_batches, toy_model

ROOT = Path(__file__).parents[2]
LOOP = LoopConfig(updates=4, learning_rate=1e-2, accumulate=2, checkpoint_every=2, progress=False, ema_decay=0.5)


def train(folder, *, micro_batch, loop=LOOP, resume=False, broken_on=None, identity=None, on_update=None):
    here = Processes()
    model = toy_model()
    if here.index > 0:
        with torch.no_grad():
            next(model.parameters()).add_(1.0)  # fit has to start every process from the main one's parameters
    plain = plain_loss(model)

    def loss_fn(batch):
        output = plain(batch)
        if here.index != broken_on:
            return output
        losses = output.sample_losses * torch.tensor([1.0, torch.nan])
        return StepOutput(output.loss * torch.nan, losses, output.metrics)

    batches = toy_batches(micro_batch, loop.accumulate, here.index, here.count)
    result = fit(
        batches,
        loss_fn,
        list(model.parameters()),
        loop,
        folder=folder,
        names=names,
        resume=resume,
        identity=identity,
        on_update=on_update,
    )
    return [param.tolist() for param in model.parameters()], result.metrics


def error_of(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except (ValueError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {error}", getattr(error, "records", None)
    return None


def on_a_full_disk(folder):
    with patch.object(checkpoint, "_seal", side_effect=OSError(28, "No space left on device")):
        return error_of(train, folder, micro_batch=2)


def in_each_process(folder: Path) -> None:
    """What each of the two processes does; what it saw goes to a file of its own."""
    torch.set_num_threads(1)
    here = Processes()
    params, metrics = train(folder / "two", micro_batch=2)
    longer = dataclasses.replace(LOOP, updates=6)
    resumed, _ = train(folder / "two", micro_batch=2, loop=longer, resume=True)
    undisturbed, _ = train(folder / "undisturbed", micro_batch=2, loop=longer)
    seen = {
        "params": params,
        "metrics": metrics,
        "resumed_equals_undisturbed": resumed == undisturbed,
        "uneven": error_of(train, folder / "uneven", micro_batch=2 + here.index),
        "nan": error_of(train, folder / "nan", micro_batch=2, broken_on=1),
        "full": on_a_full_disk(folder / "full"),
        "again": error_of(train, folder / "two", micro_batch=2),
        "told": {
            "updates": error_of(
                train, folder / "told", micro_batch=2, loop=dataclasses.replace(LOOP, updates=4 + here.index)
            ),
            "prompts": error_of(train, folder / "told", micro_batch=2, identity={"prompts": f"{here.index} prompts"}),
            "resume": error_of(train, folder / "told", micro_batch=2, resume=here.index == 1),
        },
        "only shown": error_of(
            train, folder / "shown", micro_batch=2, loop=dataclasses.replace(LOOP, updates=1, progress=here.is_main)
        ),
    }
    part = torch.tensor([[0, 1], [2, 3]]) + 10 * here.index
    joined = here.join(part, dim=1)
    seen |= {"joined": joined.tolist(), "own": torch.equal(here.own(joined, dim=1), part)}
    started = time.perf_counter()
    try:
        train(folder / "left", micro_batch=2, on_update=leave if here.index == 1 else None)
    except (ValueError, RuntimeError) as error:
        seen["left"] = [type(error).__name__, str(error)], time.perf_counter() - started
        torch.distributed.destroy_process_group()  # as at the end of a process
    (folder / f"seen-{here.index}.json").write_text(json.dumps(seen))


def leave(update, metrics):
    if update == 2:
        raise ValueError("this process has seen enough")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*torchrun, "-m", "tests.training.test_processes", str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    return folder, [json.loads((folder / f"seen-{index}.json").read_text()) for index in range(2)]


def test_who_waits_for_a_process_that_has_ended_is_told_at_once(two):
    (waiting, seconds), (leaving, _) = (seen["left"] for seen in two[1])
    assert leaving[0] == "ValueError" and seconds < 10
    assert waiting[0] == "LostProcessError"
    assert waiting[1].startswith("process 1 of 2 failed, ValueError: this process has seen enough")


def test_two_processes_make_the_update_of_one(two, tmp_path):
    _, seen = two
    params, metrics = train(tmp_path / "one", micro_batch=4)
    assert seen[0]["params"] == seen[1]["params"]
    for ours, theirs in zip(seen[0]["params"], params, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-6)
    for name in ("loop/loss", "loop/grad_norm"):
        assert seen[1]["metrics"][name] == pytest.approx(metrics[name], rel=1e-5)


def test_the_log_is_written_once_and_counts_both(two):
    folder, _ = two
    lines = read_metrics(folder / "undisturbed")
    assert [(line["update"], line["samples"]) for line in lines] == [(n, 8 * n) for n in range(1, 7)]
    assert [line["update"] for line in read_metrics(folder / "two")] == [1, 2, 3, 4, 5, 6]


def test_resuming_is_exact_in_both(two):
    assert all(seen["resumed_equals_undisturbed"] for seen in two[1])


def test_uneven_micro_batches_stop_both(two):
    for seen in two[1]:
        assert "the processes have micro-batches of [2, 3] samples in update 1" in seen["uneven"][0]


def test_a_loss_broken_in_one_names_its_records_in_both(two):
    part_one = toy_batches(2, 2, 1, 2)(0)
    expected = [next(part_one).names[1], next(part_one).names[1]]
    for seen in two[1]:
        assert seen["nan"][0].startswith(f"{NonFiniteLossError.__name__}: the loss of update 1 is not finite")
        assert seen["nan"][1] == expected


def test_a_full_disk_stops_both(two):
    main, other = (seen["full"][0] for seen in two[1])
    assert main.startswith("OSError: [Errno 28] could not save")
    assert other.startswith(
        "LostProcessError: the main process failed, so this one stops too: OSError: [Errno 28] could not"
    )


def test_a_folder_in_use_is_refused_by_both(two):
    main, other = (seen["again"][0] for seen in two[1])
    assert main.startswith("InputError: ")
    assert "already holds a run" in main
    assert "already holds a run" in other


@pytest.mark.parametrize(
    ("what", "said"), [("updates", "updates: 4, 5"), ("prompts", "0 prompts, 1 prompts"), ("resume", "False, True")]
)
def test_processes_that_were_told_different_things_refuse_together(two, what, said):
    folder, seen = two
    for one in seen:
        assert one["told"][what][0].startswith("InputError: the 2 processes were told different things (")
        assert f"{said}, in the order of the processes)" in one["told"][what][0]
        assert one["only shown"] is None
    assert not list((folder / "told").glob("checkpoint-*"))


def test_what_is_joined_is_in_the_order_of_the_processes(two):
    for one in two[1]:
        assert one["joined"] == [[0, 1, 10, 11], [2, 3, 12, 13]]
        assert one["own"]


def test_one_process_continues_what_two_began(two, tmp_path):
    folder, _ = two
    longer = dataclasses.replace(LOOP, updates=7, accumulate=1)
    shutil.copytree(folder / "undisturbed", tmp_path / "two")
    params, _ = train(tmp_path / "two", micro_batch=8, loop=longer, resume=True)
    alone, _ = train(tmp_path / "one", micro_batch=8, loop=longer)
    for ours, theirs in zip(params, alone, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-6)


def test_what_one_process_continues_is_of_the_same_size(two):
    folder, _ = two
    with pytest.raises(ValueError, match="update 7 has 4 samples, those before had 8; expected the same: resume with"):
        longer = dataclasses.replace(LOOP, updates=7, accumulate=1)
        train(folder / "undisturbed", micro_batch=4, loop=longer, resume=True)


def test_processes_that_accelerate_does_not_see_are_not_strangers(monkeypatch):
    Processes()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched, but accelerate was set up for 1; expected all"):
        Processes()


def test_one_of_several_that_accelerate_was_asked_for_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")  # as `accelerate launch --cpu --num_processes 1` sets it
    assert Processes().count == 1
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # … and with --num_processes 2, where it still starts one
    with pytest.raises(ValueError, match="asked for several processes, but has started this one alone.*torchrun"):
        Processes()


def test_parameters_on_another_processs_device_are_refused():
    here = Processes()
    here.count, here.index, here.device = 2, 1, torch.device("cuda:1")
    with pytest.raises(ValueError, match="of process 1 are on cpu; expected its own device, cuda:1, .* move the"):
        here.broadcast(list(toy_model().parameters()))


def test_launchers_that_own_the_model_are_refused():
    with pytest.raises(
        ValueError, match="launched with FSDP, which shards or wraps the model; expected plain processes"
    ):
        check_kind(DistributedType.FSDP)
    check_kind(DistributedType.MULTI_GPU)


if __name__ == "__main__":
    in_each_process(Path(sys.argv[1]))
