"""Judging on held-out prompts: paired, on prompts that nothing was trained on, by the reward that was asked for."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rpo.errors import InputError
from rpo.evaluation.held_out import HeldOut, HeldOutConfig, Judged, Sampling
from rpo.models.checkpoint import Checkpoint
from rpo.models.usual import usual_guidance, usual_steps
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
    config = HeldOutConfig(
        prompts=str(texts), count=2, images_per_prompt=2, reward=REDNESS, num_steps=3, batch_size=3, eta=1
    )
    model = Checkpoint(tiny_sd())
    found = HeldOut(config).judge(model)
    drawn = generate(model, ["a cat", "a dog"], seed=0, images_per_prompt=2, num_steps=3, guidance_scale=7.5, eta=1.0)
    assert (found.texts, found.domains) == (("a cat", "a cat", "a dog", "a dog"), ("animals",) * 4)
    assert torch.allclose(torch.tensor(found.scores).float(), drawn[:, 0].mean(dim=(1, 2)), atol=1e-4)
    assert found.means == {"animals": pytest.approx(found.scores.mean())}


def test_a_gain_is_paired_image_by_image():
    texts, domains = tuple(f"prompt {index}" for index in range(40)), ("new",) * 20 + ("newer",) * 20
    noise = np.random.default_rng(0).normal(size=40)
    before = Judged(texts, domains, 100 * noise, Sampling(seed=0))
    after = replace(before, scores=100 * noise + 1)
    gain = after.gains_over(before)["new"]
    assert (gain.value, gain.low, gain.high) == pytest.approx((1, 1, 1), abs=1e-6)
    with pytest.raises(ValueError, match="prompts differ"):
        after.gains_over(replace(before, texts=("another",) * 40))


def test_without_a_number_the_pipelines_own_is_taken():
    model = Checkpoint(tiny_sd())
    assert (usual_steps(model), usual_guidance(model)) == (50, 7.5)
    assert (usual_steps(model, 3), usual_guidance(model, 1.0)) == (3, 1.0)


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


@pytest.mark.parametrize(("lines", "count"), [("a cat\n", 160), ("a cat\na dog\n", 1)], ids=["few lines", "few asked"])
def test_one_prompt_is_refused_before_anything_is_drawn(lines, count, tmp_path):
    """Between prompts a gain has no interval then."""
    (tmp_path / "few.txt").write_text(lines)
    with pytest.raises(InputError, match="needs 2 or more"):
        HeldOut(HeldOutConfig(prompts=str(tmp_path / "few.txt"), count=count))
