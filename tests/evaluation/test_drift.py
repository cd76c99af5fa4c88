"""How far a number moved, against the distribution that it must have where nothing moves."""

import math

import pytest
import torch

from rpo.evaluation.drift import moved
from rpo.randomness import keyed_generator


def test_a_move_is_told_in_both_units():
    before = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, math.nan, 9.0])
    now = before - torch.tensor([0.4, 0.6, 0.5, 0.5, 0.5, 0.0, math.nan])
    move = moved(before, now)
    assert move is not None
    assert (move.before, move.now) == (pytest.approx(3.0), pytest.approx(2.5))
    assert move.spreads == pytest.approx(-0.5 / before[:5].std().item())


def test_without_a_change_moves_are_standard_normal_whatever_the_number_of_prompts():
    generator = keyed_generator("moves", 0)
    for prompts in (6, 16, 64):
        pairs = torch.randn(4000, 2, prompts, generator=generator, dtype=torch.float64)
        found = torch.tensor([move.errors for one in pairs if (move := moved(*one))])
        assert len(found) == len(pairs)
        for bound, share in ((1.0, 0.1587), (2.0, 0.02275)):
            assert (found > bound).double().mean().item() == pytest.approx(share, abs=4 * math.sqrt(share / len(found)))


def test_noise_that_both_have_does_not_hide_a_move():
    generator = keyed_generator("both", 0)
    prompts = 10 * torch.randn(16, generator=generator)
    move = moved(prompts, prompts - 1 + 0.1 * torch.randn(16, generator=generator))
    assert move is not None
    assert move.errors < -5 and abs(move.spreads) < 0.2


def test_a_move_without_noise_is_sure_and_none_is_none():
    before = torch.arange(5.0)
    still, up = moved(before, before), moved(before, before + 1)
    assert still is not None and up is not None
    assert (still.errors, still.spreads) == (0, 0)
    assert up.errors == math.inf
    assert moved(before[:4], before[:4]) is None
