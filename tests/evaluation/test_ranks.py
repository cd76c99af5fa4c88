"""Rank correlations of known orders, and an interval that is as wide as what it resamples."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from rpo.errors import InputError
from rpo.evaluation.ranks import rank_agreement, rank_correlation


def test_it_is_spearmans():
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.integers(5, size=(2, 9)).astype(float)  # with ties
        assert rank_correlation(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert rank_correlation([1, 2, 3, 4], [2, 4, 8, 9]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [9, 8, 4, 2]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0


def test_an_order_that_every_prompt_and_seed_has_is_certain():
    steps = np.arange(4.0)
    before = steps[:, None] + np.zeros((4, 30))
    after = steps[:, None, None] + np.zeros((4, 3, 30))
    found = rank_agreement(before, after, seed=0)
    assert (found.value, found.low, found.high) == pytest.approx((1, 1, 1))
    found = rank_agreement(before, -after, seed=0)
    assert (found.value, found.low, found.high) == pytest.approx((-1, -1, -1))


def test_an_order_by_chance_has_a_wide_interval():
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=(4, 50)), rng.normal(size=(4, 3, 50))
    found = rank_agreement(before, after, seed=0)
    assert found.low < -0.5 and found.high > 0.5
    assert found == rank_agreement(before, after, seed=0)
    surer = rank_agreement(before + 3 * np.arange(4)[:, None], after + 3 * np.arange(4)[:, None, None], seed=0)
    assert surer.low == pytest.approx(1)


def test_seeds_count():
    """Two seeds that say the opposite leave the sign open, however many prompts there are."""
    order = np.arange(3.0)[:, None, None]
    after = np.concatenate([order + np.zeros((3, 1, 500)), 0.9 - order + np.zeros((3, 1, 500))], axis=1)
    found = rank_agreement(np.arange(3.0)[:, None] + np.zeros((3, 500)), after, seed=0)
    assert (found.low, found.high) == pytest.approx((-1, 1))


def test_other_shapes_are_refused():
    with pytest.raises(InputError, match="prompts"):
        rank_agreement(np.zeros((3, 5)), np.zeros((3, 2, 6)), seed=0)
