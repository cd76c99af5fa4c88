"""What an objective is told of a set's scores, whatever the scale of the reward behind them."""

import numpy as np
import pytest
import torch

from rpo.data.preference import PreferencePair, encode_png, pair_set
from rpo.objectives.preference.dpo import Dpo
from rpo.trainers.pairs.facts import pair_facts, score_dispersion

IMAGES = [encode_png(np.full((64, 64, 3), grey, np.uint8)) for grey in (0, 255)]


def scored(*scores, scale=1.0):
    return pair_set([PreferencePair("a hat", *IMAGES, scale * one, scale * other) for one, other in scores])


def gaps_of(pairs):
    return pair_facts(pairs, Dpo(margin_from="rewards"), measure=pytest.fail).score_gaps


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_gaps_count_in_units_of_the_mean_gap(scale):
    torch.testing.assert_close(gaps_of(scored((3, 2), (7, 2), (1, 4), scale=scale)), torch.tensor([1, 5, -3]) / 3)


def test_equal_scores_give_no_margin_and_are_refused():
    with pytest.raises(ValueError, match="chosen_score and rejected_score are equal in all 2 pairs"):
        gaps_of(scored((3, 3), (1, 1)))
    assert gaps_of(scored((3, 3), (2, 1))).tolist() == [0, 2]


def test_the_scores_of_a_prompt_scatter_over_all_its_pairs():
    torch.testing.assert_close(score_dispersion(scored((1, 3), (5, 7))), torch.tensor([5.0, 5.0]).sqrt())


def test_nothing_is_measured_that_is_not_asked_for():
    facts = pair_facts(scored((3, 2)), Dpo(), measure=pytest.fail)
    assert facts.score_gaps is None and facts.context_scale is None
