"""10 updates = 5 + kill -9 + 5, to the bit: parameters, average, generators, the caller's state, and the log."""

import dataclasses

import pytest
import torch

from rpo.training import resume
from rpo.training.checkpoint import checkpoints, read_part
from rpo.training.log import TIMINGS, read_metrics
from rpo.training.loop import fit
from rpo.training.resume import versions
from tests.run_state import assert_refused
from tests.training.toy import (
    CONFIG,
    LOOP,
    RunningMean,
    killed_runs,
    names,
    noisy_loss,
    run,
    toy_batches,
    toy_model,
    train_noisy,
)


def everything(folder, trained):
    model, mean, result = trained
    lines = [{key: value for key, value in line.items() if key not in TIMINGS} for line in read_metrics(folder)]
    metrics = {key: value for key, value in result.metrics.items() if key not in TIMINGS}
    last = torch.load(result.checkpoint / "weights.pt", weights_only=True)
    return {
        "params": [param.tolist() for param in model.parameters()],
        "live": [param.tolist() for param in last["params"]],
        "mean": (mean.value.tolist(), mean.calls),
        "lines": lines,
        "metrics": metrics,
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return everything(folder, train_noisy(folder))


def test_two_runs_are_equal(tmp_path, undisturbed):
    assert everything(tmp_path, train_noisy(tmp_path)) == undisturbed


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Runs that were killed with SIGKILL, by what they were doing."""
    folder = tmp_path_factory.mktemp("killed")
    killed_runs(folder)
    return folder


def test_killed_in_an_update(killed, undisturbed):
    folder = killed / "update"
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-000002", "checkpoint-000004"]
    assert [line["update"] for line in read_metrics(folder)] == [3]
    assert everything(folder, train_noisy(folder, resume=True)) == undisturbed


def test_killed_again_in_saving(killed, undisturbed):
    folder = killed / "saving"
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-000004", "checkpoint-000006"]
    assert (folder / "checkpoint-000008.tmp" / "weights.pt").is_file()
    assert everything(folder, train_noisy(folder, resume=True)) == undisturbed
    assert not list(folder.glob("*.tmp"))


def test_killed_before_the_first_checkpoint_starts_anew(killed, undisturbed):
    folder = killed / "early"
    assert checkpoints(folder) == []
    assert everything(folder, train_noisy(folder, resume=True)) == undisturbed


def test_resuming_a_finished_run_only_loads_it(tmp_path, undisturbed):
    train_noisy(tmp_path)
    assert everything(tmp_path, train_noisy(tmp_path, resume=True, kill_in_call=1)) == undisturbed


def test_an_interrupt_in_the_middle_does_not_leak_into_the_checkpoint(tmp_path, undisturbed):
    model, mean = toy_model(), RunningMean()
    loss_fn, calls = noisy_loss(model, mean), 0

    def interrupted(batch):
        nonlocal calls
        calls += 1
        output = loss_fn(batch)  # draws from every generator and changes the running mean
        if calls == 15:
            raise KeyboardInterrupt
        return output

    with pytest.raises(KeyboardInterrupt):
        fit(
            toy_batches(accumulate=2),
            interrupted,
            list(model.parameters()),
            CONFIG,
            folder=tmp_path,
            names=names,
            state={"mean": mean},
        )
    assert checkpoints(tmp_path)[-1].name == "checkpoint-000007"  # not one of the regular ones
    assert everything(tmp_path, train_noisy(tmp_path, resume=True)) == undisturbed


def test_a_constant_rate_may_be_prolonged(tmp_path):
    loop = dataclasses.replace(CONFIG, lr_schedule="constant", log_every=1)
    train_noisy(tmp_path / "a", loop=dataclasses.replace(loop, updates=5))
    prolonged = train_noisy(tmp_path / "a", loop=loop, resume=True)
    whole = train_noisy(tmp_path / "b", loop=loop)
    assert everything(tmp_path / "a", prolonged) == everything(tmp_path / "b", whole)
    seconds = [line["seconds"] for line in read_metrics(tmp_path / "a")]
    assert seconds == sorted(seconds)  # counted over both sessions


def resumed_with(folder, **changes):
    arguments = {
        "batches": toy_batches(accumulate=2),
        "loop": CONFIG,
        "model": toy_model(),
        "state": {"mean": RunningMean()},
        **changes,
    }
    model = arguments["model"]
    fit(
        arguments["batches"],
        noisy_loss(model, RunningMean()),
        list(model.parameters()),
        arguments["loop"],
        folder=folder,
        names=names,
        resume=True,
        state=arguments["state"],
    )


@pytest.fixture
def five_updates(tmp_path):
    loop = dataclasses.replace(CONFIG, lr_schedule="constant", updates=5, ema_decay=None)
    train_noisy(tmp_path, loop=loop)
    return tmp_path, dataclasses.replace(loop, updates=10)


def test_what_does_not_fit_the_checkpoint_is_refused(five_updates):
    folder, loop = five_updates
    wider = torch.nn.Sequential(torch.nn.Linear(6, 17), torch.nn.Linear(17, 1))
    cases = [
        ({"loop": dataclasses.replace(loop, seed=1)}, "changed .seed from 0 to 1."),
        ({"loop": dataclasses.replace(loop, updates=4)}, "is past the end, updates=4; expected updates=5 or more"),
        ({"model": wider}, r"holds params\[0\] of shape \(16, 6\), this run's has \(17, 6\)"),
        ({"model": torch.nn.Linear(6, 1)}, "holds 4 parameters, this run trains 2"),
        ({"state": {}}, r"holds the state of \['mean'\], this run keeps \[\]; expected the same names"),
        ({"batches": toy_batches(micro_batch=3, accumulate=2)}, "update 6 has 6 samples, those before had 8"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            resumed_with(folder, **{"loop": loop, **change})
    resumed_with(folder, loop=loop)


def test_a_damaged_checkpoint_says_how_to_go_on(tmp_path, undisturbed):
    train_noisy(tmp_path)
    newest = checkpoints(tmp_path)[-1]
    content = (newest / "optimizer.pt").read_bytes()
    (newest / "optimizer.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"optimizer\.pt is truncated.*to continue from checkpoint-000008"):
        train_noisy(tmp_path, resume=True)
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    assert everything(tmp_path, train_noisy(tmp_path, resume=True)) == undisturbed


@pytest.mark.parametrize("name", ["checkpoint-000007", "checkpoint-000012", "checkpoint-1000000"])
def test_a_renamed_checkpoint_is_named(five_updates, name):
    folder, loop = five_updates
    (folder / "checkpoint-000005").rename(folder / name)
    message = f"{name} holds the state after 5 updates; .* rename it to checkpoint-000005, or delete the folder"
    assert_refused(folder, message, lambda: resumed_with(folder, loop=dataclasses.replace(loop, updates=10**6)))


def test_what_a_run_is_made_of_is_in_its_checkpoint_and_must_be_the_same(tmp_path):
    def attempt(identity, updates=2, resume=True):
        run(tmp_path, loop=dataclasses.replace(LOOP, updates=updates), identity=identity, resume=resume)

    attempt({"base": "a", "pairs": "b"}, updates=1, resume=False)
    cases = {
        "base from a to c": {"base": "c", "pairs": "b"},
        "pairs from b to nothing said of it": {"base": "a"},
        "more from nothing said of it to d": {"base": "a", "pairs": "b", "more": "d"},
        "base from a to b; pairs from b to a": {"base": "b", "pairs": "a"},
    }
    for message, identity in cases.items():
        assert_refused(tmp_path, f"what it is made of changed .{message}.;", lambda one=identity: attempt(one))
    attempt({"pairs": "b", "base": "a"})
    assert [line["update"] for line in read_metrics(tmp_path)] == [1, 2]


def test_other_versions_are_said_in_one_line_and_not_refused(tmp_path, capsys, monkeypatch):
    run(tmp_path, loop=dataclasses.replace(LOOP, updates=1))
    libraries = {"rpo", "torch", "diffusers", "transformers", "peft", "accelerate"}
    assert set(read_part(checkpoints(tmp_path)[0], "run.json")["versions"]) == libraries
    run(tmp_path, loop=dataclasses.replace(LOOP, updates=2), resume=True)
    assert "versions" not in capsys.readouterr().out
    now = versions()
    monkeypatch.setattr(resume, "version", lambda name: "99.1" if name == "peft" else now[name])
    run(tmp_path, loop=dataclasses.replace(LOOP, updates=3), resume=True)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "versions" in line]
    assert line == f"resumed with other versions, so the last bits may differ: peft {now['peft']} → 99.1"
    assert len(read_metrics(tmp_path)) == 3
