"""How far a number moved, against the distribution that it must have where nothing moves."""

import math

import pytest
import torch

from rpo.evaluation.drift import moved
from rpo.randomness import keyed_generator


def test_a_move_is_told_surely_and_by_its_size():
    before = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, math.nan, 9.0])
    now = before - torch.tensor([0.4, 0.6, 0.5, -0.1, 0.5, 0.0, math.nan])
    move = moved(before, now)
    assert move is not None
    assert (move.before, move.now) == (pytest.approx(3.0), pytest.approx(2.62))
    assert move.spreads == pytest.approx(-0.38 / before[:5].std().item())
    ranks = [2, 5, 3.5, 1, 3.5]  # of 0.4, 0.6, 0.5, 0.1, 0.5
    assert move.z == pytest.approx((1 - 2 - 5 - 3.5 - 3.5) / math.sqrt(sum(rank**2 for rank in ranks)))


def test_without_a_change_moves_are_standard_normal_whatever_the_tails():
    generator = keyed_generator("moves", 0)
    for prompts, tails in ((16, 1.0), (32, 3.0)):
        normal = torch.randn(4000, 2, prompts, generator=generator, dtype=torch.float64)
        pairs = normal.sign() * normal.abs() ** tails
        found = torch.tensor([move.z for one in pairs if (move := moved(*one))])
        assert len(found) == len(pairs)
        for bound, share in ((1.0, 0.1587), (2.0, 0.02275)):
            assert (found > bound).double().mean().item() == pytest.approx(share, abs=5 * math.sqrt(share / len(found)))


def test_a_few_prompts_that_change_by_much_do_not_hide_what_all_others_do():
    before = torch.zeros(32)
    now = -0.1 - 0.1 * torch.rand(32, generator=keyed_generator("small", 0))
    now[:3] = torch.tensor([8.0, -12.0, 5.0])
    move = moved(before, now)
    assert move is not None
    assert move.z < -3


def test_noise_that_both_have_does_not_hide_a_move():
    generator = keyed_generator("both", 0)
    prompts = 10 * torch.randn(16, generator=generator)
    move = moved(prompts, prompts - 1 + 0.1 * torch.randn(16, generator=generator))
    assert move is not None
    assert move.z < -3.4 and abs(move.spreads) < 0.2


def test_no_change_is_no_move():
    before = torch.arange(5.0)
    still = moved(before, before)
    assert still is not None
    assert (still.z, still.spreads) == (0, 0)
    assert moved(before[:4], before[:4] + 1) is None
