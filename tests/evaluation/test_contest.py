"""Contests: win rates with their ties, intervals by hand, categories, and diversity in closed form."""

import doctest
import itertools
import json

import numpy as np
import pytest
import torch
from scipy import stats

from rpo.errors import InputError
from rpo.evaluation import intervals
from rpo.evaluation.contest import ALL, contest, contests, embedding_diversity, pixel_diversity
from rpo.evaluation.intervals import accuracy, win_rate
from rpo.evaluation.result import Compared, Evaluation, read_evaluation

PROMPTS = [f"prompt {number}" for number in range(4)]


def test_the_difference_is_that_of_a_paired_t_interval_by_hand():
    """Below `FEW_PROMPTS` the interval is Student's: mean ± t · s/√n of the prompts' mean differences."""
    before, after = [1.0, 2.0, 3.0, 4.0], [1.5, 2.0, 4.0, 3.5]
    gain = contest(ALL, before, after, PROMPTS).means.gain
    differences = np.array([0.5, 0.0, 1.0, -0.5])
    half = stats.t.ppf(0.975, 3) * differences.std(ddof=1) / 2
    assert (gain.value, gain.low, gain.high) == pytest.approx((0.25, 0.25 - half, 0.25 + half))


def test_a_tie_counts_half():
    found = contest(ALL, [1.0, 2.0, 3.0, 4.0], [1.5, 2.0, 4.0, 3.5], PROMPTS)
    assert (found.wins, found.ties, found.losses) == (2, 1, 1)
    assert found.win_rate.value == 2.5 / 4
    swapped = contest(ALL, [1.5, 2.0, 4.0, 3.5], [1.0, 2.0, 3.0, 4.0], PROMPTS)
    assert swapped.win_rate.value == 1 - found.win_rate.value
    ends = (1 - swapped.win_rate.high, 1 - swapped.win_rate.low)
    assert (found.win_rate.low, found.win_rate.high) == pytest.approx(ends)


def test_without_ties_a_win_rate_is_an_accuracy():
    draws = np.random.default_rng(0).normal(size=(2, 60))
    groups = [number // 3 for number in range(60)]
    rate, share = win_rate(*draws, groups=groups), accuracy(draws[1] > draws[0], groups=groups)
    assert (rate.value, rate.low, rate.high) == pytest.approx((share.value, share.low, share.high))


def test_ties_narrow_the_interval_as_they_narrow_what_it_is_of():
    """Of n images, each a prompt, with a share t of ties the variance of the mean is (1 - t)/(4n)."""
    before, after = np.zeros(400), np.array([0.0] * 300 + [1.0, -1.0] * 50)
    rate = win_rate(before, after, groups=range(400))
    by_hand = stats.t.ppf(0.975, 399) * np.sqrt(0.25 * 0.25 / 400)
    assert rate.value == 0.5
    assert (rate.high - rate.low) / 2 == pytest.approx(by_hand, rel=0.01)


def test_a_model_against_itself():
    scores = np.random.default_rng(0).normal(size=40).tolist()
    found = contest(ALL, scores, scores, [number // 2 for number in range(40)])
    assert (found.means.gain.value, found.means.gain.low, found.means.gain.high) == (0, 0, 0)
    assert (found.wins, found.ties, found.losses) == (0, 40, 0)
    assert found.win_rate.value == 0.5 and found.win_rate.low < 0.5 < found.win_rate.high


def test_win_rates_cover_what_they_are_of():
    """Of 40 prompts with two images each, half of them ties, 95 % of intervals hold the truth."""
    rng, hits = np.random.default_rng(1), 0
    for _ in range(400):
        taste = rng.normal(0.3, 1, size=(40, 1)) + rng.normal(size=(40, 2))  # images of a prompt resemble each other
        after = np.where(np.abs(taste) < 0.8, 0, np.sign(taste)).ravel()
        rate = win_rate(np.zeros(80), after, groups=[number // 2 for number in range(80)])
        above = stats.norm(0.3, np.sqrt(2))
        truth = above.sf(0.8) + 0.5 * (above.cdf(0.8) - above.cdf(-0.8))
        hits += rate.low <= truth <= rate.high
    assert 0.92 <= hits / 400 <= 0.98


def test_categories_are_compared_by_themselves():
    before, after = [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, -1.0, 0.0]
    rows = contests(before, after, categories=["x", "x", "y", "y"], groups=PROMPTS)
    assert [(row.means.name, row.means.gain.value, row.win_rate.value) for row in rows] == [
        (ALL, 0.25, 0.625),
        ("x", 1.0, 1.0),
        ("y", -0.5, 0.25),
    ]
    assert [row.means.name for row in contests(before, after, categories=["x"] * 4, groups=PROMPTS)] == [ALL]


def test_diversity_is_the_mean_distance_of_two_images():
    levels = np.array([0, 51, 255, 10, 10, 10], np.uint8)
    images = np.broadcast_to(levels[:, None, None, None], (6, 4, 4, 3))
    by_hand = np.mean([abs(a - b) for a, b in itertools.combinations([0, 51, 255], 2)]) / 255
    assert pixel_diversity(images, 3) == pytest.approx([by_hand, 0])
    angles = torch.tensor([0.0, 60.0, 90.0, 7.0, 7.0, 7.0]).deg2rad()
    unit = torch.stack([angles.cos(), angles.sin()], 1)
    cosines = [0.5, 0.0, np.cos(np.pi / 6)]
    assert embedding_diversity(unit, 3) == pytest.approx([1 - np.mean(cosines), 0], abs=1e-6)


def evaluation():
    rows = contests([0.0, 1.0], [1.0, 1.0], categories=["x", "y"], groups=["a", "b"])
    pinned = {
        "models": [{"label": "base"}, {"label": "mine"}],
        "prompts": {"list": [{"prompt": "a", "category": "x"}, {"prompt": "b", "category": "y"}]},
        "sampling": {"images_per_prompt": 1},
    }
    scores = {"base": {"r": (0.0, 1.0)}, "mine": {"r": (1.0, 1.0)}}
    return Evaluation(pinned, (Compared("base", "mine", "r", rows),), (), (), scores)


def test_a_result_is_read_as_it_was_written_and_not_if_it_was_changed(tmp_path):
    found = evaluation()
    assert found.compared[0].rows[1].means.gain.low == -np.inf, "one prompt tells nothing about others"
    found.write(tmp_path / "evaluation.json")
    assert read_evaluation(tmp_path) == found == read_evaluation(tmp_path / "evaluation.json")
    text = (tmp_path / "evaluation.json").read_text()
    assert "Infinity" not in text and "NaN" not in text
    told = json.loads(text)
    for change in ({"more": 1}, {"scores": {}}, {"compared": []}, {"pinned": {**told["pinned"], "models": []}}):
        (tmp_path / "evaluation.json").write_text(json.dumps({**told, **change}))
        with pytest.raises(InputError, match="evaluate again"):
            read_evaluation(tmp_path)
    (tmp_path / "evaluation.json").write_text("[]")
    with pytest.raises(InputError, match="evaluate again"):
        read_evaluation(tmp_path)
    with pytest.raises(InputError, match="there is no"):
        read_evaluation(tmp_path / "elsewhere")


def test_examples():
    assert doctest.testmod(intervals).failed == 0
