import re

import numpy as np
import pytest
import torch
from PIL import Image

from rpo.rewards.base import RewardError, score
from rpo.shapes.critic import ShapesCritic
from rpo.shapes.prompts import sample_prompts
from rpo.shapes.reward import CRITIC, GRADED, STRICT, ShapesReward
from rpo.shapes.verifier import verify_all
from rpo.shapes.world import draw_scene, render


def scenes(count):
    """Images of prompts, and the prompts of their neighbours: some right, some nearly so, most wrong."""
    drawn = sample_prompts("train", count, 3)
    rng = np.random.default_rng(3)
    pixels = np.stack([render(draw_scene(prompt, rng)) for prompt in drawn])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    texts = [prompt.text for prompt in drawn]
    return images, texts[: count // 2] + texts[-1 : count // 2 - 1 : -1]


def test_graded_and_strict_are_the_verdicts():
    images, prompts = scenes(40)
    verdicts = verify_all(images, prompts)
    graded, strict = GRADED(images, prompts), STRICT(images, prompts)
    assert graded.tolist() == pytest.approx([verdict.score for verdict in verdicts])
    assert strict.tolist() == [verdict.holds for verdict in verdicts]
    assert strict[:20].min() == 1 and strict.mean() < 1
    assert len(set(graded.tolist())) > 3
    assert torch.equal(graded == 1, strict == 1)


def test_the_critics_mark_is_what_the_critic_says():
    images, prompts = scenes(12)
    pictures = [to_pil_image(image) for image in images]
    marks = [critique.overall / 10 for critique in ShapesCritic()(pictures, prompts)]
    assert CRITIC(images, prompts).tolist() == pytest.approx(marks)
    assert max(marks) == 1 and len(set(marks)) > 2


def to_pil_image(image):
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def test_it_is_graded_by_default():
    assert ShapesReward() == GRADED != STRICT


def test_a_prompt_of_another_world_is_named_with_its_image(tmp_path):
    images, prompts = scenes(4)
    prompts[2] = "a photo of a cat"
    message = "reward 'shapes', image 2 ('a photo of a cat'): prompt 'a photo of a cat' is not a sentence of the shapes"
    with pytest.raises(RewardError, match=f"^{re.escape(message)}"):
        score(GRADED, images, prompts, name="shapes", evidence=tmp_path)
    assert [file.name for file in tmp_path.glob("*/*.png")] == ["image_002.png"]


def test_images_of_another_size():
    with pytest.raises(
        RewardError, match=r"image 0 \('a red circle'\): got a tensor of torch.float32 \[3, 32, 32\], exp"
    ):
        score(GRADED, torch.ones(1, 3, 32, 32), ["a red circle"], name="shapes")
