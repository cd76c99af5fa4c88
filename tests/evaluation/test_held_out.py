"""Judging on held-out prompts: paired, on prompts that nothing was trained on, by the reward that was asked for."""

import numpy as np
import pytest
import torch

from rpo.evaluation.held_out import HeldOut, HeldOutConfig, HeldOutScores
from rpo.models.checkpoint import Checkpoint
from rpo.sampling.sample import generate
from rpo.shapes.prompts import sample_prompts
from tests.tiny import tiny_sd


def redness(images, prompts):
    """A reward of one's own: the mean of the red channel."""
    assert len(images) == len(prompts)
    return images[:, 0].mean(dim=(1, 2))


REDNESS = f"{__name__}:redness"


def test_scores_are_those_of_the_images_that_the_settings_draw(tmp_path):
    texts = tmp_path / "animals.txt"
    texts.write_text("a cat\na dog\na fox\n")
    config = HeldOutConfig(prompts=str(texts), count=2, images_per_prompt=2, reward=REDNESS, num_steps=3, batch_size=3)
    model = Checkpoint(tiny_sd())
    found = HeldOut(config).judge(model)
    drawn = generate(model, ["a cat", "a dog"], seed=0, images_per_prompt=2, num_steps=3, guidance_scale=2.0, eta=1.0)
    assert found.prompts == {"animals": ["a cat", "a cat", "a dog", "a dog"]}
    assert torch.allclose(torch.tensor(found.scores["animals"]).float(), drawn[:, 0].mean(dim=(1, 2)), atol=1e-4)
    assert found.means == {"animals": pytest.approx(found.scores["animals"].mean())}


def test_a_gain_is_paired_image_by_image():
    texts = {"new": [f"prompt {index}" for index in range(40)]}
    noise = np.random.default_rng(0).normal(size=40)
    before = HeldOutScores(texts, {"new": 100 * noise})
    after = HeldOutScores(texts, {"new": 100 * noise + 1})
    gain = after.gain_over(before)["new"]
    assert (gain.value, gain.low, gain.high) == pytest.approx((1, 1, 1), abs=1e-6)
    with pytest.raises(ValueError, match="judged on other prompts"):
        after.gain_over(HeldOutScores({"new": ["another"] * 40}, before.scores))


def test_the_embedded_prompts_are_both_held_out_domains():
    held_out = HeldOut(HeldOutConfig(count=8))
    assert set(held_out.prompts) == {"in_domain", "out_of_domain"}
    held_out.refuse_trained([prompt.text for prompt in sample_prompts("train", 690, seed=0)])
    taken = held_out.prompts["in_domain"][3]
    with pytest.raises(ValueError, match=rf"1 of the held-out prompts are trained on, '{taken}' for one"):
        held_out.refuse_trained(["a cat", taken])


@pytest.mark.parametrize("key", ["count", "images_per_prompt"])
def test_settings_that_judge_nothing_are_refused(key):
    with pytest.raises(ValueError, match=f"HeldOutConfig sets '{key}' to 0, but a whole number"):
        HeldOutConfig(**{key: 0})
