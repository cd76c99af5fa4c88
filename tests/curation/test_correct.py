"""Self-correction edits what a critic finds wrong, and leaves the rest alone."""

import torch

from rpo.curation.correct import SelfCorrection
from rpo.data.pixels import to_pixels
from tests.pipelines.test_rich_preference import Critic, Editor, Instructor

PROMPTS = ["a red circle", "a green triangle", "a red square"]


def drawn(count):
    steps = torch.linspace(0, 1, 16)
    return (steps[:, None] * torch.linspace(0.2, 1, count)[:, None, None, None]).expand(count, 3, 16, 16).clone()


def test_what_is_wrong_is_edited_and_the_rest_is_not():
    editor, images = Editor(), drawn(3)
    correct = SelfCorrection(Critic(), Instructor(), editor, seed=1)
    found = correct(images, PROMPTS, 0)
    assert torch.equal(found[1], images[1])
    assert (to_pixels(found)[[0, 2]] == to_pixels(images.flip(2, 3))[[0, 2]]).all()
    assert (correct.edited, correct.faults) == (2, 0)
    seeds = [seed for _, seed in editor.heard]
    assert len(set(seeds)) == 2
    correct(images, PROMPTS, 0)
    assert [seed for _, seed in editor.heard] == seeds
    correct(images, PROMPTS, 1)
    assert not set(seeds) & {seed for _, seed in editor.heard}


def test_what_nobody_can_criticise_is_left_and_counted():
    correct = SelfCorrection(Critic(), Instructor(), Editor())
    images = drawn(2)
    found = correct(images, ["a blue circle", "a green triangle"], 0)
    assert torch.equal(found, images)
    assert (correct.edited, correct.faults) == (0, 1)
