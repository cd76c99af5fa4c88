import re
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from rpo.shapes.verifier import PARTIAL_CREDIT, Verdict, judge, read_scene, verify, verify_all
from rpo.shapes.world import (
    COLORS,
    IMAGE_SIZE,
    SHAPES,
    ObjectType,
    Prompt,
    draw_scene,
    parse_prompt,
    prompts,
    render,
    sample_prompts,
)
from tests.shapes.pictures import BLUE_SQUARE, RED_CIRCLE, degrade, picture

MIRROR = {"above": "below", "below": "above", "to the left of": "to the right of", "to the right of": "to the left of"}
EVERYTHING = prompts("train") + prompts("in_domain") + prompts("out_of_domain")


def altered(prompt, rng):
    """A prompt that the scenes of `prompt` do not satisfy: one colour, shape, number or relation is off."""
    first, *rest = prompt.objects
    candidates = [
        replace(prompt, objects=(ObjectType(_other(COLORS, first.color, rng), first.shape), *rest)),
        replace(prompt, objects=(ObjectType(first.color, _other(SHAPES, first.shape, rng)), *rest)),
    ]
    if prompt.kind in ("single", "count"):
        number = _other((1, 2, 3), prompt.count, rng)
        candidates.append(Prompt("single" if number == 1 else "count", prompt.objects, count=number))
    if prompt.kind == "relation":
        candidates += [replace(prompt, relation=_other(MIRROR, prompt.relation, rng))] * 2
    if prompt.kind == "conjunction":
        candidates.append(Prompt("single", (first,)))
    candidates = [changed for changed in candidates if len(set(changed.objects)) == len(changed.objects)]
    return candidates[rng.integers(len(candidates))]


def _other(names, own, rng):
    others = [name for name in names if name != own]
    return others[rng.integers(len(others))]


@pytest.mark.parametrize(
    ("count", "spoil", "required"),
    [
        (600, lambda image, rng: image, 0.995),
        pytest.param(2000, lambda image, rng: image, 0.995, marks=pytest.mark.slow),
        (600, degrade, 0.99),
    ],
    ids=["clean", "many clean", "after a lossy round trip"],
)
def test_accuracy_on_fresh_scenes(count, spoil, required):
    rng = np.random.default_rng(11)
    right_yes = right_no = 0
    for prompt in [*sample_prompts("train", count // 2, 11), *sample_prompts("out_of_domain", count // 2, 11)]:
        scene = read_scene(spoil(render(draw_scene(prompt, rng)), rng))
        right_yes += judge(scene, prompt).holds
        right_no += not judge(scene, altered(prompt, rng)).holds
    assert right_yes / count >= required
    assert right_no / count >= required


RED_SQUARE, GREEN_TRIANGLE = ("square", "red", 20, 16, 8), ("triangle", "green", 20, 46, 8)
TRIANGLES = [("triangle", "green", 16, 16, 8), ("triangle", "green", 46, 16, 8), ("triangle", "green", 32, 46, 8)]


@pytest.mark.parametrize(
    ("objects", "text", "score", "reason"),
    [
        ([RED_CIRCLE], "a red circle", 1, "shows a red circle"),
        ([RED_CIRCLE], "a blue circle", PARTIAL_CREDIT, "wrong colour: a blue circle wanted, a red circle seen"),
        ([RED_CIRCLE], "a red square", PARTIAL_CREDIT, "wrong shape: a red square wanted, a red circle seen"),
        ([RED_CIRCLE], "a blue square", 0, "missing: a blue square; extra object: a red circle"),
        ([RED_CIRCLE, BLUE_SQUARE], "a red circle", 1 / 2, "extra object: a blue square"),
        ([RED_CIRCLE], "two red circles", 1 / 2, "two red circles wanted, one seen"),
        ([BLUE_SQUARE], "two red circles", 0, "two red circles wanted, none seen; extra object: a blue square"),
        (TRIANGLES, "three green triangles", 1, "shows three green triangles"),
        (TRIANGLES, "two green triangles", 2 / 3, "two green triangles wanted, three seen"),
        (TRIANGLES[:2], "three green triangles", 2 / 3, "three green triangles wanted, two seen"),
        (
            [GREEN_TRIANGLE, RED_CIRCLE],
            "two green triangles",
            1 / 2,
            "two green triangles wanted, one seen; extra object: a red circle",
        ),
        (
            [GREEN_TRIANGLE, ("triangle", "red", 46, 16, 8)],
            "two green triangles",
            (1 + PARTIAL_CREDIT) / 2,
            "two green triangles wanted, one seen; wrong colour: a green triangle wanted, a red triangle seen",
        ),
        (
            [*TRIANGLES[:2], BLUE_SQUARE],
            "two green triangles",
            2 / 3,
            "extra object: a blue square",
        ),
        ([RED_CIRCLE, BLUE_SQUARE], "a red circle and a blue square", 1, "shows a red circle and a blue square"),
        ([RED_CIRCLE, BLUE_SQUARE], "a blue square and a red circle", 1, "shows a blue square and a red circle"),
        ([RED_CIRCLE], "a red circle and a blue square", 1 / 2, "missing: a blue square"),
        (
            [RED_CIRCLE, GREEN_TRIANGLE],
            "a red circle and a blue square",
            1 / 2,
            "missing: a blue square; extra object: a green triangle",
        ),
        (
            [RED_SQUARE, GREEN_TRIANGLE],
            "a red circle and a green square",
            2 * PARTIAL_CREDIT / 2,
            "wrong shape: a red circle wanted, a red square seen; "
            "wrong shape: a green square wanted, a green triangle seen",
        ),
        ([RED_CIRCLE, BLUE_SQUARE], "a red circle above a blue square", 1, "shows a red circle above a blue square"),
        ([RED_CIRCLE, BLUE_SQUARE], "a blue square below a red circle", 1, "shows a blue square below a red circle"),
        (
            [RED_CIRCLE, BLUE_SQUARE],
            "a red circle below a blue square",
            2 / 3,
            "wrong relation: the red circle is above the blue square",
        ),
        (
            [RED_CIRCLE, BLUE_SQUARE],
            "a red circle to the left of a blue square",
            2 / 3,
            "wrong relation: the red circle is above the blue square",
        ),
        ([RED_CIRCLE], "a red circle above a blue square", 1 / 3, "missing: a blue square"),
        (
            [RED_CIRCLE, ("square", "green", 40, 46, 8)],
            "a red circle above a blue square",
            (1 + PARTIAL_CREDIT) / 3,
            "wrong colour: a blue square wanted, a green square seen",
        ),
        (
            [RED_CIRCLE, BLUE_SQUARE, ("triangle", "green", 54, 14, 7)],
            "a red circle above a blue square",
            3 / 4,
            "extra object: a green triangle",
        ),
    ],
)
def test_scores_and_reasons(objects, text, score, reason):
    verdict = verify(picture(*objects), text)
    assert verdict.score == pytest.approx(score, abs=1e-12)
    assert verdict.reason == reason
    assert verdict.holds == (score == 1)


def test_a_problem_says_where_it_is():
    (problem,) = verify(picture(RED_CIRCLE, BLUE_SQUARE), "a red circle").problems
    assert (problem.kind, problem.what) == ("extra", "extra object: a blue square")
    assert problem.at == pytest.approx((40, 46), abs=0.1)
    (problem,) = verify(picture(RED_CIRCLE), "a red circle and a blue square").problems
    assert (problem.kind, problem.at) == ("missing", None)


@pytest.mark.parametrize(("dx", "dy"), [(0, -20), (0, 20), (-20, 0), (20, 0), (16, -20), (-20, 16)])
def test_of_the_four_relations_exactly_the_true_one_holds(dx, dy):
    image = picture(("circle", "red", 32 + dx / 2, 32 + dy / 2, 8), ("square", "blue", 32 - dx / 2, 32 - dy / 2, 8))
    upright = "above" if dy < 0 else "below"
    sideways = "to the left of" if dx < 0 else "to the right of"
    expected = upright if abs(dy) > abs(dx) else sideways
    held = [relation for relation in MIRROR if verify(image, f"a red circle {relation} a blue square").holds]
    assert held == [expected]


def test_a_relation_between_overlapping_objects_is_not_clear():
    image = picture(("square", "blue", 32, 34, 10), ("circle", "red", 32, 30, 6.5))
    scene = read_scene(image)
    first = replace(scene.objects[0], color="red", shape="circle", x=32.0, y=27.0)
    second = replace(first, color="blue", shape="square", x=32.0, y=34.0)
    verdict = judge(replace(scene, objects=(first, second)), parse_prompt("a red circle above a blue square"))
    assert verdict.reason == "wrong relation: the red circle is not clearly above the blue square"
    assert verdict.score == pytest.approx(2 / 3)


def test_score_is_one_exactly_if_the_prompt_holds():
    rng = np.random.default_rng(13)
    for index in range(150):
        scene = read_scene(render(draw_scene(EVERYTHING[rng.integers(len(EVERYTHING))], rng)))
        for prompt in sample_prompts("train", 16, index):
            verdict = judge(scene, prompt)
            assert 0 <= verdict.score <= 1
            assert verdict.holds == (verdict.score == 1) == (not verdict.problems)


def test_fixing_one_thing_after_another_never_lowers_the_score():
    steps = [
        [],
        [GREEN_TRIANGLE],
        [("circle", "green", 20, 16, 8)],
        [RED_CIRCLE],
        [RED_CIRCLE, ("triangle", "blue", 40, 46, 8)],
        [("circle", "red", 40, 46, 8), ("square", "blue", 20, 16, 8)],
        [RED_CIRCLE, BLUE_SQUARE],
    ]
    scores = [verify(picture(*objects), "a red circle above a blue square").score for objects in steps]
    assert scores == sorted(scores)
    assert scores[0] == scores[1] == 0 < scores[2] < scores[3] < scores[4] < scores[5] < scores[6] == 1


def test_float_images_are_judged_like_their_pixels():
    rng = np.random.default_rng(17)
    chosen = sample_prompts("train", 12, 17)
    pixels = [degrade(render(draw_scene(prompt, rng)), rng) for prompt in chosen]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255
    expected = [verify(image, prompt) for image, prompt in zip(pixels, chosen, strict=True)]
    assert verify_all(images, chosen) == expected
    assert verify_all(images.double().requires_grad_(), [prompt.text for prompt in chosen]) == expected
    assert [verdict.holds for verdict in verify_all(images.bfloat16(), chosen)] == [item.holds for item in expected]
    assert isinstance(expected[0], Verdict)


GOOD = torch.full((3, IMAGE_SIZE, IMAGE_SIZE), 0.95)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (
            GOOD[None],
            "got a tensor of torch.float32 [1, 3, 64, 64], expected float [3, 64, 64]; "
            "give one image at a time in [0, 1], or a batch to verify_all",
        ),
        (
            GOOD[:, :32],
            "got a tensor of torch.float32 [3, 32, 64], expected float [3, 64, 64]; "
            "give one image at a time in [0, 1], or a batch to verify_all",
        ),
        (
            (GOOD * 255).byte(),
            "got a tensor of torch.uint8 [3, 64, 64], expected float [3, 64, 64]; "
            "give one image at a time in [0, 1], or a batch to verify_all",
        ),
        (
            GOOD * 200,
            "got image values from 190 to 190, expected [0, 1]; divide by 255, or map [-1, 1] by x / 2 + 0.5",
        ),
        (GOOD * -1, "got image values from -0.95 to -0.95, expected [0, 1]"),
        (GOOD * torch.nan, "got image values from nan to nan, expected [0, 1]"),
        (
            np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3)),
            "got an array of float64 [64, 64, 3], expected an array of uint8 [64, 64, 3]; "
            "give a rendered scene, or a float tensor [3, 64, 64] in [0, 1]",
        ),
        (
            np.zeros((3, IMAGE_SIZE, IMAGE_SIZE), np.uint8),
            "got an array of uint8 [3, 64, 64], expected an array of uint8 [64, 64, 3]; ",
        ),
        ([[0]], "got a list, expected an array of uint8 [64, 64, 3]; "),
    ],
)
def test_a_bad_image_is_refused(image, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        verify(image, "a red circle")


def test_rounding_beyond_the_range_is_accepted():
    assert verify(GOOD + 0.0504, "a red circle").score == 0


def test_a_single_bad_value_is_enough():
    spoiled = GOOD.clone()
    spoiled[1, 5, 7] = torch.nan
    with pytest.raises(ValueError, match="expected"):
        verify(spoiled, "a red circle")


def test_a_batch_names_the_image_at_fault():
    images = torch.stack([GOOD, GOOD * 2])
    with pytest.raises(ValueError, match=r"^image 1: got image values from 1\.9 to 1\.9, expected \[0, 1\]"):
        verify_all(images, ["a red circle"] * 2)
    with pytest.raises(ValueError, match="^image 0: prompt 'a dog' is not a sentence"):
        verify_all(images, ["a dog"] * 2)


def test_every_image_needs_a_prompt():
    message = "got 2 images and 1 prompts, but every image needs its own prompt; repeat each prompt once per image"
    with pytest.raises(ValueError, match=message):
        verify_all(torch.stack([GOOD, GOOD]), ["a red circle"])


@pytest.mark.slow  # by the clock: for an idle machine
def test_three_hundred_images_a_second():
    rng = np.random.default_rng(18)
    chosen = sample_prompts("train", 200, 18)
    images = [render(draw_scene(prompt, rng)) for prompt in chosen]
    verify(images[0], chosen[0])
    seconds = []
    for _ in range(3):
        start = time.process_time()
        for image, prompt in zip(images, chosen, strict=True):
            verify(image, prompt)
        seconds.append(time.process_time() - start)
    assert len(images) / min(seconds) > 300
