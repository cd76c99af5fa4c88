"""The settings: what they refuse, what may change on resuming, what they come to."""

import dataclasses
import json

import pytest
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
        ({"mixed_precision": "fp8"}, "'mixed_precision' to 'fp8', but one of no, bf16, fp16 is needed"),
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
