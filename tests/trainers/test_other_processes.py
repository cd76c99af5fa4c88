"""A run goes on with another number of processes as if nothing had happened: two, then four, then one."""

import pytest
import torch

from rpo.trainers.rollouts.settings import MonitorConfig, StepsConfig
from rpo.training.log import read_metrics
from rpo.training.processes import Processes
from tests.forked import together
from tests.trainers.online_runs import endpoint, grpo, small_value  # noqa: F401
from tests.trainers.pair_runs import steady
from tests.trainers.test_sharding import online, pairs, weights

pytestmark = pytest.mark.slow

ONLINE = {
    "steps": StepsConfig(passes=2),  # so that all three end within a rollout
    "monitor": MonitorConfig(prompts=4, every=1),
}
RUNS = {
    "dpo": (pairs, {"flip": True}),
    "dpo of all weights": (pairs, {"adapter": {"train": "full"}, "speed": {"ema_decay": 0.5}}),
    "grpo": (online, {"make": grpo, "clip": 0.1}),
    "ddpo": (online, {"make": grpo, "baseline": "prompt_history", "history": 6}),
    "endpoint": (online, {"make": endpoint, "baseline": "value", "kl_weight": 0.01}),
}
PARTS = ((2, 1, 1), (4, 3, 2), (1, 5, 1))
"""Processes, updates done at the end, machines."""


def go_on(folder, name, sharding, updates):
    make, changes = RUNS[name]
    changes = dict(changes) if make is pairs else ONLINE | changes
    speed = changes.pop("speed", {}) | {"updates": updates}
    trainer = steady(make(folder, sharding, speed=speed, **changes))
    start = weights(trainer)
    trainer.train(resume=True)
    return start, weights(trainer), Processes().count


@pytest.mark.parametrize("sharding", ["none", "full then hybrid"])
@pytest.mark.parametrize("name", RUNS)
def test_two_then_four_then_one(tmp_path, name, sharding):
    folder, found = tmp_path / "run", None
    for processes, updates, machines in PARTS:
        kind = "none" if sharding == "none" else "hybrid" if machines > 1 else "full"
        answers = tmp_path / f"answers-{processes}"
        found = together(processes, answers, go_on, folder, name, kind, updates, machines=machines)
        assert [one[2] for one in found] == [processes] * processes
    start, alone, _ = go_on(tmp_path / "alone", name, "none", PARTS[-1][1])
    assert (alone - start).abs().max() > 1e-3
    torch.testing.assert_close(found[0][1], alone, rtol=0, atol=1e-5)
    both = [read_metrics(place) for place in (folder, tmp_path / "alone")]
    for line, expected in zip(*both, strict=True):
        assert (line["update"], line["samples"]) == (expected["update"], expected["samples"])
        for metric in {"watched/reward", "reward/mean"} & expected.keys():
            assert line[metric] == pytest.approx(expected[metric], rel=1e-3, abs=1e-5, nan_ok=True), metric


def too_many(folder):
    with pytest.raises(ValueError, match="pairs_per_update=4 is not a multiple of learning.micro_batch=1 times 3"):
        pairs(folder, "none", speed={"micro_batch": 1})


def other_update(folder):
    trainer = pairs(folder, "none", speed={"micro_batch": 2, "updates": 3}, pairs_per_update=8)
    with pytest.raises(ValueError, match=r"what it is made of changed \(pairs_per_update from 4 to 8"):
        trainer.train(resume=True)


def test_an_update_that_cannot_be_shared_out_as_before_is_refused(tmp_path):
    pairs(tmp_path / "run", "none").train()
    together(3, tmp_path / "three", too_many, tmp_path / "run")
    together(2, tmp_path / "two", other_update, tmp_path / "run")
