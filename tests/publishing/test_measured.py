"""What a card says of held-out prompts."""

import numpy as np
import pytest

from rpo.evaluation.held_out import Judged, Sampling
from rpo.publishing.measured import measured, results_of, samples_of
from rpo.publishing.model_card import CardFacts, write_model_card
from tests.publishing.test_publish import base, folder, trained  # noqa: F401, fixtures


def judged(scores, *, seed=0):
    texts = tuple(f"prompt {one}" for one in range(len(scores)))
    images = np.arange(len(scores), dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2).repeat(3, 3)
    domains = tuple("near" if one % 2 else "far" for one in range(len(scores)))
    return Judged(texts, domains, np.array(scores, dtype=np.float64), Sampling(seed, num_steps=20), images)


def test_what_a_judge_affirms_is_a_share_and_what_it_scores_is_a_number(folder):  # noqa: F811
    claims = judged([0, 0, 1, 0] * 8), judged([1, 0, 1, 1] * 8)
    (rows,) = results_of(*claims).values()
    assert [(row.name, row.is_share, row.before.value, row.after.value) for row in rows] == [
        ("far", True, 0.5, 1.0),
        ("near", True, 0.0, 0.5),
    ]
    scores = judged([20.5, 21.0] * 8), judged([21.5, 21.0] * 8)
    (rows,) = results_of(*scores).values()
    assert [(row.is_share, row.gain.value) for row in rows] == [(False, 1.0), (False, 0.0)]
    for pair, expected in ((claims, "| 50.0 % ["), (scores, "| 20.5 [20.5, 20.5] | 21.5 [21.5, 21.5] | +1 [+1, +1] |")):
        text = write_model_card(folder, measured(CardFacts("GRPO"), *pair, "some-judge")).read_text()
        assert expected in text and "Judged by `some-judge`" in text and "20 steps" in text and "seed 0" in text


def test_its_gallery_is_drawn_at_random_and_the_same_each_time():
    found = samples_of(judged([0.5] * 40))
    numbers = [int(one.prompt.split()[1]) for one in found]
    assert len(set(numbers)) == 6 and numbers != list(range(6))
    assert [one.pixels.max() for one in found] == numbers
    assert [one.prompt for one in samples_of(judged([0.5] * 40))] == [one.prompt for one in found]


def test_models_on_other_noise_are_not_compared():
    with pytest.raises(ValueError, match="same noise"):
        results_of(judged([0.5]), judged([0.6], seed=1))
