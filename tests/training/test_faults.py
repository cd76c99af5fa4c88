"""Whatever goes wrong is named, and the last good state is kept."""

import dataclasses
import signal

import numpy as np
import pytest
import torch
from torch import nn

from rpo.interrupts import Terminated
from rpo.training import checkpoint
from rpo.training.checkpoint import checkpoints
from rpo.training.log import read_metrics
from rpo.training.loop import NonFiniteLossError
from rpo.types import StepOutput
from tests.training.toy import LOOP, Batch, RunningMean, equal, plain_loss, run, toy_batches, toy_model, values


def test_a_short_micro_batch_is_refused(tmp_path):
    def draw(first_update):
        full = toy_batches(4)(first_update)
        for batch in full:
            yield batch
            yield Batch(batch.x[:3], batch.y[:3], batch.names[:3])

    message = "micro-batch 2 of 2 of update 1 has 3 samples, but the first one had 4; expected the same number in each"
    with pytest.raises(ValueError, match=message):
        run(tmp_path, loop=dataclasses.replace(LOOP, accumulate=2), batches=draw)


def test_batches_that_end_are_an_error(tmp_path):
    def draw(first_update):
        full = toy_batches(4)(first_update)
        yield from (next(full) for _ in range(5))

    message = "the batches ended at micro-batch 2 of 2 of update 3; expected 2 for each update: draw from an endless"
    with pytest.raises(ValueError, match=message):
        run(tmp_path, loop=dataclasses.replace(LOOP, accumulate=2), batches=draw)
    assert checkpoints(tmp_path)[-1].name == "checkpoint-000002"


def broken(model, update, *, where, accumulate=1):
    """The plain loss, but not finite in one row, in a term of no row, or in the gradient only."""
    plain, calls = plain_loss(model), 0

    def loss_fn(batch):
        nonlocal calls
        calls += 1
        output = plain(batch)
        if (calls - 1) // accumulate != update - 1:
            return output
        if where == "row":
            losses = output.sample_losses.clone()
            losses[2] = torch.nan
            return StepOutput(output.loss + losses.mean(), losses, output.metrics)
        if where == "term":
            return StepOutput(output.loss * torch.inf, output.sample_losses, output.metrics)
        weight = next(model.parameters())
        return StepOutput(output.loss + (weight * 0).abs().sqrt().sum(), output.sample_losses, output.metrics)

    return loss_fn


@pytest.mark.parametrize("where", ["row", "term", "gradient"])
def test_what_is_not_finite_is_named_and_not_applied(tmp_path, where):
    loop = dataclasses.replace(LOOP, accumulate=2)
    good, _ = run(tmp_path / "good", loop=dataclasses.replace(loop, updates=3))
    model = toy_model()
    with pytest.raises(NonFiniteLossError) as caught:
        run(tmp_path / "bad", loop=loop, model=model, loss_fn=broken(model, 4, where=where, accumulate=2))
    draws = toy_batches(4, accumulate=2)(3)
    first, second = next(draws).names, next(draws).names
    expected = [first[2], second[2]] if where == "row" else first + second
    assert caught.value.records == expected
    assert caught.value.update == 4
    assert caught.value.checkpoint == tmp_path / "bad" / "checkpoint-000003" == checkpoints(tmp_path / "bad")[-1]
    what = "gradient" if where == "gradient" else "loss"
    listed = ", ".join(repr(name) for name in expected)
    blamed = "repair or remove these records and" if where == "row" else "these are all records of the update, so that"
    message = str(caught.value)
    assert message.startswith(
        f"the {what} of update 4 is not finite, for the records {listed}; expected finite numbers: "
    )
    assert blamed in message
    assert message.endswith(
        f"The update was not applied; the state before it is kept in {tmp_path}/bad/checkpoint-000003"
    )
    assert equal(values(model), values(good))
    resumed, _ = run(tmp_path / "bad", loop=loop, resume=True)
    undisturbed, _ = run(tmp_path / "undisturbed", loop=loop)
    assert equal(values(resumed), values(undisturbed))


def test_broken_weights_are_blamed_before_records(tmp_path):
    model = toy_model()
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(NonFiniteLossError, match="the trained weights are not finite themselves, so that no record is"):
        run(tmp_path, model=model)


def test_the_parts_of_a_loss_that_are_not_finite_are_named(tmp_path):
    model = toy_model()
    plain = plain_loss(model)

    def loss_fn(batch):
        output = plain(batch)
        first = next(iter(output.metrics))
        return StepOutput(
            output.loss * torch.nan, output.sample_losses, output.metrics | {first: output.loss * torch.inf}
        )

    with pytest.raises(
        NonFiniteLossError, match=r"^the loss of update 1 is not finite, nor are [a-z]+/\w+, for the re"
    ):
        run(tmp_path, model=model, loss_fn=loss_fn)


def test_many_records_are_counted_not_listed(tmp_path):
    model = toy_model()
    with pytest.raises(NonFiniteLossError, match=r"'row-\d+' and 2 more; expected .* nothing was trained before it"):
        run(tmp_path, micro_batch=10, model=model, loss_fn=broken(model, 1, where="term"))
    assert checkpoints(tmp_path) == []
    run(tmp_path)  # and the folder is free for another try


def test_fp16_overflow_is_skipped_and_a_nan_loss_is_not(tmp_path):
    class OverflowAbove(torch.autograd.Function):
        """Stands for a network in half precision: gradients beyond what it can hold are infinite."""

        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, gradient):
            return torch.where(gradient > 20000, torch.inf, gradient)

    model = toy_model()
    plain = plain_loss(model)

    def loss_fn(batch):
        output = plain(batch)
        return StepOutput(OverflowAbove.apply(output.loss), output.sample_losses, output.metrics)

    loop = dataclasses.replace(LOOP, scale_loss=True, ema_decay=0.5)
    start, after = values(model), []
    run(tmp_path / "a", loop=loop, model=model, loss_fn=loss_fn, on_update=lambda *_: after.append(values(model)))
    lines = read_metrics(tmp_path / "a")
    assert [line["loop/loss_scale"] for line in lines] == [65536, 32768, 16384, 16384, 16384]
    assert [line["loop/skipped"] for line in lines] == [1, 1, 0, 0, 0]
    assert [line["loop/grad_norm"] is None for line in lines] == [True, True, False, False, False]
    assert equal(after[1], start)
    assert not equal(after[2], start)

    model = toy_model()
    with pytest.raises(NonFiniteLossError, match="the loss of update 2 is not finite"):
        run(tmp_path / "b", loop=loop, model=model, loss_fn=broken(model, 2, where="row"))


def test_fp16_gradient_that_no_scale_can_save_is_an_error(tmp_path):
    loop = dataclasses.replace(LOOP, updates=50, scale_loss=True)
    model = toy_model()
    plain = plain_loss(model)

    def loss_fn(batch):
        output = plain(batch)
        weight = next(model.parameters())
        return StepOutput(output.loss + (weight * 0).abs().sqrt().sum(), output.sample_losses, output.metrics)

    with pytest.raises(NonFiniteLossError, match="the gradient of update 17 is not finite"):
        run(tmp_path, loop=loop, model=model, loss_fn=loss_fn)


def test_the_guard_stops_the_run_and_keeps_it_stopped(tmp_path, capsys):
    def guard(metrics):
        return "the margin fell" if metrics["loop/loss"] < 2.5 else None

    loop = dataclasses.replace(LOOP, updates=50, log_every=50)
    model, result = run(tmp_path, loop=loop, guard=guard)
    assert result.stopped_because == "the margin fell"
    assert 0 < result.updates < 50
    assert f"stopped after update {result.updates}: the margin fell" in capsys.readouterr().out
    assert [line["update"] for line in read_metrics(tmp_path)] == [result.updates]
    assert checkpoints(tmp_path)[-1].name == f"checkpoint-{result.updates:06d}"
    again, second = run(tmp_path, loop=loop, guard=guard, resume=True)
    assert (second.updates, second.stopped_because) == (result.updates, "the margin fell")
    assert equal(values(again), values(model))


@pytest.mark.parametrize(
    ("number", "raised"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated), (signal.SIGHUP, Terminated)],
)
def test_whatever_ends_the_process_keeps_the_last_complete_update(tmp_path, number, raised):
    model = toy_model()
    plain, calls = plain_loss(model), 0

    def loss_fn(batch):
        nonlocal calls
        calls += 1
        if calls == 4:
            signal.raise_signal(number)
        return plain(batch)

    with pytest.raises(raised) as caught:
        run(tmp_path, model=model, loss_fn=loss_fn)
    assert checkpoints(tmp_path)[-1].name == "checkpoint-000003"
    assert caught.value.__notes__ == [
        f"The state after 3 updates is kept in {tmp_path}/checkpoint-000003; resume continues there."
    ]
    assert [line["update"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    resumed, _ = run(tmp_path, resume=True)
    undisturbed, _ = run(tmp_path / "undisturbed")
    assert equal(values(resumed), values(undisturbed))


def test_an_error_in_the_data_keeps_the_last_complete_update(tmp_path):
    def draw(first_update):
        full = toy_batches(4)(first_update)
        for index, batch in enumerate(full):
            if index == 3:
                raise ValueError("image 17.png cannot be read")
            yield batch

    with pytest.raises(ValueError, match=r"17\.png"):
        run(tmp_path, batches=draw)
    assert checkpoints(tmp_path)[-1].name == "checkpoint-000003"


def test_an_optimizer_that_fails_half_way_is_not_kept(tmp_path, monkeypatch):
    step, calls = torch.optim.AdamW.step, 0

    def failing(self, closure=None):
        nonlocal calls
        calls += 1
        step(self, closure)
        if calls == 4:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path)
    assert checkpoints(tmp_path)[-1].name == "checkpoint-000002"


def test_a_full_disk_stops_the_run_and_loses_nothing(tmp_path, monkeypatch):
    seal = checkpoint._seal

    def full(path, *others):
        if "000004" in path.name:
            raise OSError(28, "No space left on device")
        seal(path, *others)

    monkeypatch.setattr(checkpoint, "_seal", full)
    with pytest.raises(OSError, match=r"could not save .*checkpoint-000004: No space left on device; \d+"):
        run(tmp_path)
    monkeypatch.undo()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-000002"]
    assert not list(tmp_path.glob("*.tmp"))
    resumed, _ = run(tmp_path, resume=True)
    undisturbed, _ = run(tmp_path / "undisturbed")
    assert equal(values(resumed), values(undisturbed))


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    run(tmp_path)
    before = read_metrics(tmp_path)
    with pytest.raises(
        ValueError, match="already holds a run; expected a new folder: choose another, or pass resume=True"
    ):
        run(tmp_path)
    assert read_metrics(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: StepOutput(o.loss, o.sample_losses, {"dpo/margn": o.loss.detach()}), "nearest is 'dpo/margin'"),
        (
            lambda o: StepOutput(o.loss.detach(), o.sample_losses, o.metrics),
            r"does not depend on the param.*no_grad",
        ),
        (
            lambda o: StepOutput(o.loss, torch.cat([o.sample_losses] * 2), {}),
            "has 8 samples but 4 names; expected one name",
        ),
    ],
)
def test_a_loss_that_cannot_be_meant_is_refused(tmp_path, change, message):
    model = toy_model()
    plain = plain_loss(model)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, model=model, loss_fn=lambda batch: change(plain(batch)))


def test_metrics_must_not_come_and_go(tmp_path):
    model = toy_model()
    plain, calls = plain_loss(model), 0

    def loss_fn(batch):
        nonlocal calls
        calls += 1
        output = plain(batch)
        return output if calls == 1 else StepOutput(output.loss, output.sample_losses, {})

    with pytest.raises(ValueError, match=r"of update 2 has the metrics \[\], but the first one had \['dpo/margin'\]"):
        run(tmp_path, model=model, loss_fn=loss_fn)


def test_state_that_a_checkpoint_cannot_hold_is_refused_before_training(tmp_path):
    class Odd(RunningMean):
        def state_dict(self):
            return {"fine": [torch.zeros(1), (1, 2.0, "a", None, b"b")], "wrong": {"inner": [1, self.wrong]}}

    odd = Odd()
    for odd.wrong, kind in ((nn.Linear(1, 1), "Linear"), (np.zeros(1), "ndarray"), (np.float64(1), "float64")):
        message = rf"state odd\['wrong'\]\['inner'\]\[1\] is a {kind}, which a checkpoint cannot hold; expected tensors"
        with pytest.raises(ValueError, match=message):
            run(tmp_path, state={"odd": odd})
    assert read_metrics(tmp_path) == []
    odd.wrong = nn.Linear(1, 1).state_dict()
    _, result = run(tmp_path, state={"odd": odd})
    torch.load(result.checkpoint / "process-000.pt", weights_only=True)
