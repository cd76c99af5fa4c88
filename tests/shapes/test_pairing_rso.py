"""RSO pairs of judged images: among images of one prompt, the better verdict chosen, none used twice."""

import numpy as np
import pytest

from rpo.shapes.evaluation import Sampling, judge_images
from rpo.shapes.pairing import rejection_sampled
from rpo.shapes.world import draw_scene, render, sample_prompts

PROMPTS = sample_prompts("train", 3, seed=0)


def judged():
    """Of each prompt one image that holds, and three of other prompts."""
    images = [
        render(draw_scene(PROMPTS[(index + shift) % 3], np.random.default_rng((index, place))))
        for index in range(3)
        for place, shift in enumerate((0, 1, 2, 1))
    ]
    return judge_images(np.stack(images), {"train": PROMPTS}, Sampling(seed=0, images_per_prompt=4))


def test_pairs_are_of_one_prompt_ordered_by_the_verdict_and_repeat():
    evaluation = judged()
    pairs = rejection_sampled(evaluation, temperature=10.0, seed=1)
    assert pairs
    assert all(pair.margin > 0 for pair in pairs)
    assert {pair.prompt for pair in pairs} <= {prompt.text for prompt in PROMPTS}
    used = [image for pair in pairs for image in (pair.chosen, pair.rejected)]
    assert len(used) == len(set(used))
    again = rejection_sampled(evaluation, temperature=10.0, seed=1)
    assert [(pair.prompt, pair.chosen) for pair in again] == [(pair.prompt, pair.chosen) for pair in pairs]


def test_a_cold_tilt_leaves_no_pair_of_unequal_verdicts():
    assert rejection_sampled(judged(), temperature=1e-9) == []


def test_a_temperature_of_nothing_is_refused():
    with pytest.raises(ValueError, match="temperature is 0.0; expected a number > 0"):
        rejection_sampled(judged(), temperature=0.0)
