"""The places that a critique names are those of what is wrong, and empty ones where something is missing."""

import numpy as np
import torch

from rpo.shapes.faults import faults_of
from rpo.shapes.world import Scene, SceneObject, render

LEFT, RIGHT = SceneObject("circle", "red", 16, 32, 9), SceneObject("square", "blue", 48, 32, 9)


def found(prompt, *objects):
    image = torch.from_numpy(render(Scene(objects))).permute(2, 0, 1) / 255
    return faults_of(image[None], [prompt])[0]


def covers(mask, item):
    """Whether all of an object, but its blurred edge, is in the mask."""
    alone = render(Scene((item,))).astype(int)
    is_object = np.abs(alone - np.median(alone.reshape(-1, 3), axis=0)).sum(axis=2) > 150
    return mask.numpy()[is_object].all()


def test_nothing_is_at_fault_where_the_prompt_holds():
    assert not found("a red circle to the left of a blue square", LEFT, RIGHT).any()


def test_what_is_too_much_or_wrong_is_in_its_box_alone():
    for prompt in ("a red circle", "a red circle and a green square", "a red circle and a blue triangle"):
        mask = found(prompt, LEFT, RIGHT)
        assert covers(mask, RIGHT) and not mask[:, :28].any() and mask.float().mean() < 0.25


def test_of_two_in_a_wrong_relation_the_first_is_at_fault():
    mask = found("a red circle to the right of a blue square", LEFT, RIGHT)
    assert covers(mask, LEFT) and not mask[:, 36:].any()


def test_what_is_missing_may_come_wherever_nothing_is_right():
    mask = found("a red circle and a green triangle", LEFT)
    assert not mask[32, 16] and mask[:, 40:].all()


def test_of_too_many_alike_one_is_at_fault_and_of_too_few_none():
    three = [SceneObject("circle", "red", x, 32, 8) for x in (11, 32, 53)]
    mask = found("two red circles", *three)
    assert [covers(mask, one) for one in three].count(True) == 1
    mask = found("three red circles", *three[:2])
    assert not any(mask[32, x] for x in (11, 32)) and mask[:, 46:].all()


def test_what_cannot_be_read_is_at_fault_as_a_whole():
    assert faults_of(torch.zeros(1, 3, 64, 64), ["a red circle"]).all()
