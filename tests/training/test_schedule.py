"""The learning rate against its formula, and against torch's own scheduler."""

import math

import pytest
import torch

from rpo.training.loop_config import LoopConfig


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
