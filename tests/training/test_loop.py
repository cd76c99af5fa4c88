"""One update is the update it should be, and the run says everything about it."""

import dataclasses
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rpo.training.checkpoint import checkpoints, read_part
from rpo.training.gradients import FlatGradients
from rpo.training.log import read_metrics
from rpo.training.loop_config import LoopConfig
from rpo.training.processes import Processes
from rpo.training.state import TrainingState
from rpo.training.step import Accumulator
from tests.training.toy import LOOP, equal, names, plain_loss, run, toy_batches, toy_model, values


def test_equals_a_loop_written_by_hand(tmp_path):
    loop = dataclasses.replace(LOOP, updates=8, warmup_updates=3, weight_decay=0.1, max_grad_norm=0.5)
    ours, result = run(tmp_path, loop=loop)
    theirs = toy_model()
    loss_fn = plain_loss(theirs)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / 3))
    draws = toy_batches(4)(0)
    for _ in range(8):
        output = loss_fn(next(draws))
        optimizer.zero_grad()
        output.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
    for a, b in zip(values(ours), values(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert result.metrics["loop/loss"] == pytest.approx(output.loss.item(), rel=1e-4)
    assert result.metrics["loop/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert norm > 0.5  # so the clipping was part of the comparison


def test_accumulating_equals_one_big_batch(tmp_path):
    whole, big = run(tmp_path / "big", micro_batch=16)
    loop = dataclasses.replace(LOOP, accumulate=4)
    parts, small = run(tmp_path / "small", loop=loop, micro_batch=4)
    for a, b in zip(values(whole), values(parts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for name in ("loop/loss", "loop/grad_norm"):  # AdamW alone would not notice a gradient of another length
        assert small.metrics[name] == pytest.approx(big.metrics[name], rel=1e-4)
    assert [line["samples"] for line in read_metrics(tmp_path / "small")] == [16, 32, 48, 64, 80]


def test_a_line_says_everything_about_its_update(tmp_path):
    _, result = run(tmp_path)
    lines = read_metrics(tmp_path)
    assert [line["update"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[-1].keys() == {
        *("update", "samples", "seconds", "loop/loss", "loop/grad_norm", "loop/learning_rate", "loop/update_seconds"),
        *("loop/samples_per_second", "dpo/margin"),
    }
    assert {key: lines[-1][key] for key in result.metrics} == result.metrics
    assert lines[-1]["loop/learning_rate"] == 1e-2


def test_the_last_update_is_logged_and_saved_whatever_the_cadence(tmp_path):
    _, result = run(tmp_path, loop=dataclasses.replace(LOOP, log_every=3, checkpoint_every=4))
    assert [line["update"] for line in read_metrics(tmp_path)] == [3, 5]
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-000004", "checkpoint-000005"]
    assert result.checkpoint == tmp_path / "checkpoint-000005"


def test_fp16_scaling_changes_nothing_but_the_range(tmp_path):
    plain, _ = run(tmp_path / "a")
    scaled, _ = run(tmp_path / "b", loop=dataclasses.replace(LOOP, scale_loss=True))
    assert equal(values(plain), values(scaled))  # a power of two is exact


def test_files_of_the_caller_may_lie_in_the_folder(tmp_path):
    (tmp_path / "config.yaml").write_text("updates: 5")
    run(tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "updates: 5"


def test_the_average_is_what_is_left_and_in_the_checkpoint(tmp_path):
    model, live = toy_model(), []
    result_model, result = run(
        tmp_path,
        loop=dataclasses.replace(LOOP, ema_decay=0.5),
        model=model,
        on_update=lambda *_: live.append(values(model)),
    )
    plain, _ = run(tmp_path / "plain")
    assert equal(live[-1], values(plain))  # the average does not touch the training
    average = values(toy_model())
    for n, value in enumerate(live):
        decay = min(0.5, (1 + n) / (10 + n))
        average = [decay * a + (1 - decay) * v for a, v in zip(average, value, strict=True)]
    kept = read_part(result.checkpoint, "weights.pt")["ema"]["averages"]
    for a, b, c in zip(values(result_model), average, kept, strict=True):
        torch.testing.assert_close(a, b)
        assert torch.equal(a, c)


def test_the_callers_generators_and_gradients_are_left_alone(tmp_path):
    model = toy_model()
    torch.manual_seed(3)
    random.seed(3)
    expected = torch.rand(1).item(), random.random()
    torch.manual_seed(3)
    random.seed(3)
    model, _ = run(tmp_path, model=model)
    assert (torch.rand(1).item(), random.random()) == expected
    assert all(param.grad is None for param in model.parameters())


def test_metrics_of_an_update_are_the_mean_of_its_micro_batches(tmp_path):
    model = toy_model()
    _, result = run(tmp_path, loop=dataclasses.replace(LOOP, updates=1, accumulate=3), model=model)
    fresh = toy_model()
    loss_fn, draws = plain_loss(fresh), toy_batches(4, accumulate=3)(0)
    outputs = [loss_fn(next(draws)) for _ in range(3)]
    assert result.metrics["dpo/margin"] == pytest.approx(sum(o.metrics["dpo/margin"].item() for o in outputs) / 3)
    assert result.metrics["loop/loss"] == pytest.approx(sum(o.loss.item() for o in outputs) / 3)


class Reads(TorchDispatchMode):
    """Counts `.item()`: on a GPU each would wait for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_an_update_reads_its_numbers_in_one_go():
    model = toy_model()
    gradients = FlatGradients(list(model.parameters()))
    accumulator = Accumulator(
        plain_loss(model), names, gradients=gradients, processes=Processes(), loop=LoopConfig(accumulate=3)
    )
    with Reads() as reads:
        accumulator.run(toy_batches(4, 3)(0), update=1, scale=1.0, scale_may_shrink=False)
    assert reads.count == 0  # all of them come with a single .tolist()
    with Reads() as reads:
        torch.ones(1).item()
    assert reads.count == 1


def test_the_optimizer_keeps_float32_moments(tmp_path):
    seen = []
    original = TrainingState.shared_parts

    def spy(self, **options):
        seen.append({v.dtype for s in self.optimizer.state.values() for v in s.values()})
        return original(self, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingState, "shared_parts", spy)
        run(tmp_path)
    assert seen[-1] == {torch.float32}
