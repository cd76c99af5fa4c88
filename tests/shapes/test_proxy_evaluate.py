import json
import math

import numpy as np
import pytest
import torch

from rpo.rewards import load_reward
from rpo.shapes import PROXY
from rpo.shapes.evaluation import Sampling, judge_images
from rpo.shapes.pretrain_evaluate import to_channels_first
from rpo.shapes.prompts import sample_prompts
from rpo.shapes.proxy_evaluate import Proxy, agreement, agreements, format_proxy, scene_accuracy
from rpo.shapes.proxy_scenes import FAMILY_SIZE, draw_families
from rpo.shapes.world import draw_scene, render

HELD_OUT_SEED = 987_654


def test_agreement_in_numbers_that_can_be_checked_by_hand():
    scores = np.array([[3.0, 2.0, 1.0], [1.0, 1.0, 2.0], [5.0, 6.0, 7.0]])
    holds = np.array([[True, False, False], [True, False, False], [True, True, True]])
    verified = np.array([[1.0, 0.5, 0.2], [1.0, 0.5, 0.2], [1.0, 1.0, 1.0]])
    found = agreement(scores, holds, verified)
    assert found["accuracy"] == pytest.approx(5 / 9)
    assert found["best_of_n"] == pytest.approx(2 / 3)
    assert found["worst_of_n"] == pytest.approx(2 / 3)
    assert (found["pairs"], found["auc_within"]) == (4, pytest.approx(2.5 / 4))
    assert found["auc"] == pytest.approx((4 + 1 + 12) / 20)  # of 3, of 1, and of 5, 6 and 7
    assert found["spearman_within"] == pytest.approx((1 - math.sqrt(3) / 2) / 2)


def test_what_cannot_be_measured_is_nan():
    found = agreement(np.array([[1.0, 2.0]]), np.array([[True, True]]), np.array([[1.0, 1.0]]))
    assert math.isnan(found["auc_within"])
    assert math.isnan(found["auc"])
    assert math.isnan(found["spearman_within"])


def test_each_domain_is_compared_by_itself():
    prompts = {split: sample_prompts(split, 4, 0) for split in ("train", "in_domain")}
    generator = np.random.default_rng(0)
    pictures = []
    for prompt in [prompt for some in prompts.values() for prompt in some]:
        right = render(draw_scene(prompt, generator))
        pictures += [right, np.full_like(right, 240)]
    evaluation = judge_images(np.stack(pictures), prompts, Sampling(0, images_per_prompt=2))
    scores = np.array([1.0, 0.0] * 4 + [0.0, 1.0] * 4)
    found = agreements(evaluation, scores)
    assert found["train"]["auc_within"] == found["train"]["best_of_n"] == 1
    assert found["train"]["spearman_within"] == pytest.approx(1)
    assert found["in_domain"]["auc_within"] == found["in_domain"]["best_of_n"] == 0
    assert found["in_domain"]["accuracy"] == 0.5


@pytest.fixture(scope="module")
def held_out():
    return draw_families(HELD_OUT_SEED, 60)


def test_the_embedded_proxy_knows_scenes_that_it_never_saw(held_out):
    found = scene_accuracy(Proxy.load(PROXY, torch.device("cpu")), to_channels_first(held_out.images), held_out)
    assert found["caption_retrieval"] >= 0.9
    assert found["right_above_near_miss"] >= 0.95


def test_the_reward_scores_a_right_scene_above_a_near_miss(held_out):
    reward = load_reward("shapes-clip")
    texts = [prompt.text for prompt in held_out.prompts for _ in range(FAMILY_SIZE)]
    scores = reward(to_channels_first(held_out.images) / 255, texts).view(-1, FAMILY_SIZE)
    assert (scores[:, :1] > scores[:, 1:]).float().mean() >= 0.95


def test_the_embedded_proxy_is_small_and_says_how_good_it_is():
    assert sum(file.stat().st_size for file in PROXY.iterdir()) <= 6 * 2**20
    assert (PROXY / "model.safetensors").stat().st_mode & 0o044 == 0o044
    numbers = json.loads((PROXY / "evaluation.json").read_text())
    for split in ("train", "in_domain", "out_of_domain"):
        measured = numbers["base_images"][split]
        assert 0.5 < measured["auc_within"] < 1  # helpful, and not the truth
    assert "base's images, out_of_domain" in format_proxy(numbers)
