"""The settings: what they refuse, what may change on resuming, what they come to."""

import dataclasses
import json
import math

import pytest
import torch
from omegaconf import OmegaConf

from rpo.training.loop_config import LoopConfig, check_unchanged, describe, plain


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"updates": 0},
            "LoopConfig sets 'updates' to 0, but a whole number",
        ),
        ({"accumulate": 0}, "'accumulate' to 0, but a whole number"),
        ({"keep_checkpoints": 0}, "'keep_checkpoints' to 0, but a whole number"),
        ({"warmup_updates": -1}, "'warmup_updates' to -1, but a whole number"),
        ({"learning_rate": 0.0}, "'learning_rate' to 0.0, but a number"),
        ({"learning_rate": float("nan")}, "'learning_rate' to nan, but a number"),
        ({"max_grad_norm": 0.0}, "'max_grad_norm' to 0.0, but a number"),
        (
            {"adam_beta2": 1.0},
            "'adam_beta2' to 1.0, but a number",
        ),
        ({"ema_decay": 1.0}, "'ema_decay' to 1.0, but a number"),
        ({"updates": 9, "warmup_updates": 10}, "warmup_updates is 10 and updates 9"),
        (
            {"lr_schedule": "cosin"},
            "'lr_schedule' to 'cosin', but one of constant, cosine, linear .*'cosine'",
        ),
    ],
)
def test_impossible_numbers_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        LoopConfig(**wrong)


def test_no_clipping_is_possible():
    assert LoopConfig(max_grad_norm=float("inf")).max_grad_norm == float("inf")


def resumed_with(**changes):
    loop = LoopConfig(trackers=("wandb",), max_grad_norm=float("inf"))
    saved = json.loads(json.dumps(plain(loop)))
    check_unchanged(dataclasses.replace(loop, **changes), saved, "checkpoint-000005")


def test_the_same_settings_survive_json():
    resumed_with()


def test_cadence_and_length_may_change():
    resumed_with(updates=500, checkpoint_every=7, keep_checkpoints=1, log_every=3, trackers=(), progress=False)


def test_what_decides_the_result_may_not():
    with pytest.raises(ValueError, match="checkpoint-000005 .*learning_rate from 0.0003 to 0.01; seed from 0 to 1"):
        resumed_with(learning_rate=0.01, seed=1)


def test_the_length_may_not_change_where_the_learning_rate_depends_on_it():
    loop = LoopConfig(lr_schedule="cosine")
    with pytest.raises(ValueError, match="updates from 100 to 200"):
        check_unchanged(dataclasses.replace(loop, updates=200), plain(loop), "checkpoint-000005")


def test_description_multiplies_out():
    loop = LoopConfig(updates=100, accumulate=4)
    assert describe(loop, 8, 2, unit="pairs") == (
        "8 pairs × 4 micro-batches × 2 processes = 64 pairs per update; 100 updates = 6,400 pairs"
    )
    assert describe(LoopConfig(updates=3), 8) == (
        "8 samples × 1 micro-batch = 8 samples per update; 3 updates = 24 samples"
    )


def test_it_is_a_structured_config():
    merged = OmegaConf.merge(OmegaConf.structured(LoopConfig), OmegaConf.from_dotlist(["updates=7", "ema_decay=0.9"]))
    loop = OmegaConf.to_object(merged)
    assert (loop.updates, loop.ema_decay, tuple(loop.trackers)) == (7, 0.9, ())


def loop(schedule, warmup, updates):
    return LoopConfig(learning_rate=1.0, lr_schedule=schedule, warmup_updates=warmup, updates=updates)


def rates(schedule, warmup, updates):
    return [2 * loop(schedule, warmup, updates).rate(update) for update in range(updates)]


def test_constant_with_warmup_reaches_its_peak_in_the_last_warmup_update():
    assert rates("constant", 4, 6) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_constant_without_warmup_is_constant():
    assert rates("constant", 0, 3) == [2.0, 2.0, 2.0]


def test_linear_falls_in_equal_parts_and_would_reach_zero_right_after_the_end():
    assert rates("linear", 1, 5) == [2.0, 2.0, 1.5, 1.0, 0.5]
    assert loop("linear", 1, 5).rate(5) == 0.0


def test_cosine_is_half_its_peak_half_way():
    values = rates("cosine", 2, 10)
    assert values[2] == 2.0
    assert values[6] == pytest.approx(1.0)
    assert values[9] == pytest.approx(1 + math.cos(math.pi * 7 / 8))


def test_cosine_equals_torchs_annealing():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
    expected = []
    for _ in range(8):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates("cosine", 0, 8) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_no_update_is_spent_at_rate_zero(schedule):
    for warmup in (0, 3, 10):
        assert min(rates(schedule, warmup, 10)) > 0
