"""Critic, instructor and judge of the shapes world against the verifier, on many scenes, right and wrong ones."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from PIL import Image

from rpo.curation.components import INSTRUCTORS, load_critic, load_instructor
from rpo.curation.curate_config import ChatConfig
from rpo.curation.judge import load_judge
from rpo.curation.records import Critique, Problem
from rpo.curation.vlm.instructor import why_no_command
from rpo.shapes.edits import MAX_EDITS, parse_edits
from rpo.shapes.prompts import KINDS, sample_prompts
from rpo.shapes.verifier import verify
from rpo.shapes.world import DIRECTIONS, Scene, SceneObject, draw_scene, render
from tests.shapes.pictures import degrade

CRITIC = load_critic(ChatConfig())
INSTRUCTOR = load_instructor(ChatConfig())
RED_CIRCLE = SceneObject("circle", "red", 20, 16, 8)
BLUE_SQUARE = SceneObject("square", "blue", 40, 46, 8)
GREEN_TRIANGLE = SceneObject("triangle", "green", 48, 16, 8)


def picture(*objects):
    return Image.fromarray(render(Scene(tuple(objects))))


@cache
def many_scenes(count=200):
    """Scenes that show their prompt, another prompt, a damaged scene, random overlapping objects, or none at all."""
    rng = np.random.default_rng(5)
    scenes = []
    wanted, shown = sample_prompts("train", count, 6), sample_prompts("out_of_domain", count, 7)
    for index in range(count):
        draw = index % 5
        if draw == 3:
            picks = [sample_prompts("train", 8, index)[place].objects[0] for place in rng.integers(8, size=4)]
            places = rng.integers(10, 54, (4, 2)).tolist()
            scene = [SceneObject(one.shape, one.color, x, y, 9) for one, (x, y) in zip(picks, places, strict=True)]
            pixels = render(Scene(tuple(scene)))
        elif draw == 4:
            pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) if index % 2 else render(Scene(()))
        else:
            pixels = render(draw_scene((wanted if draw == 0 else shown)[index], rng))
            pixels = degrade(pixels, rng) if draw == 2 else pixels
        scenes.append((Image.fromarray(pixels), wanted[index].text))
    return scenes


def test_the_critic_sees_what_the_verifier_sees():
    found = {True: 0, False: 0}
    for image, caption in many_scenes():
        (critique,) = CRITIC([image], [caption])
        verdict = verify(np.asarray(image), caption)
        found[verdict.holds] += 1
        assert critique.nothing_to_fix == verdict.holds == (critique.overall == 10)
        assert sorted(one.what for one in critique.problems) == sorted(one.what for one in verdict.problems)
        severities = [one.severity for one in critique.problems]
        assert severities == sorted(severities, reverse=True)
        assert [bool(one.where) for one in critique.problems].count(True) == sum(
            one.at is not None for one in verdict.problems
        )
    assert min(found.values()) > 30


def test_a_better_score_is_never_a_lower_overall():
    pairs = [
        (verify(np.asarray(image), text).score, CRITIC([image], [text])[0].overall) for image, text in many_scenes()
    ]
    overall = [value for _, value in sorted(pairs)]
    assert overall == sorted(overall) and len(set(overall)) > 4


@pytest.mark.parametrize(
    ("objects", "caption", "what", "where", "keep"),
    [
        (
            [RED_CIRCLE, BLUE_SQUARE],
            "a red circle",
            "extra object: a blue square",
            "lower middle (x 40, y 46)",
            ("the red circle", "the plain background"),
        ),
        (
            [RED_CIRCLE],
            "a red circle and a blue square",
            "missing: a blue square",
            "",
            ("the red circle", "the plain background"),
        ),
        (
            [RED_CIRCLE],
            "a red square",
            "wrong shape: a red square wanted, a red circle seen",
            "upper left (x 20, y 16)",
            ("the plain background",),
        ),
        (
            [RED_CIRCLE, BLUE_SQUARE],
            "a red circle below a blue square",
            "wrong relation: the red circle is above the blue square",
            "upper left (x 20, y 16)",
            ("the red circle", "the blue square", "the plain background"),
        ),
        (
            [SceneObject("circle", "red", 32, 32, 8)],
            "a blue circle",
            "wrong colour: a blue circle wanted, a red circle seen",
            "centre (x 32, y 32)",
            ("the plain background",),
        ),
    ],
)
def test_what_is_wrong_where_and_what_to_keep(objects, caption, what, where, keep):
    (critique,) = CRITIC([picture(*objects)], [caption])
    (problem,) = critique.problems
    assert (problem.what, problem.where, critique.keep) == (what, where, keep)


def test_what_is_right_is_kept_with_its_relation():
    (critique,) = CRITIC([picture(RED_CIRCLE, BLUE_SQUARE, GREEN_TRIANGLE)], ["a red circle above a blue square"])
    assert critique.keep == ("the red circle above the blue square", "the plain background")


def test_other_images_and_captions_are_refused():
    with pytest.raises(
        ValueError, match="^got an image of 32 x 64; the shapes world has 64 x 64; use a critic for pho"
    ):
        CRITIC([Image.new("RGB", (32, 64))], ["a red circle"])
    with pytest.raises(ValueError, match="^prompt 'a dog' is not a sentence of the shapes world"):
        CRITIC([picture(RED_CIRCLE)], ["a dog"])


@pytest.mark.parametrize(
    ("objects", "caption", "told"),
    [
        ([RED_CIRCLE], "a red circle", ""),
        ([], "a red circle", "add a red circle"),
        ([], "three red circles", "add a red circle; add a red circle"),
        ([RED_CIRCLE, BLUE_SQUARE], "a red circle", "remove the blue square"),
        ([RED_CIRCLE], "a blue circle", "change the red circle to blue"),
        ([RED_CIRCLE], "a red square", "change the red circle to a red square"),
        ([RED_CIRCLE], "a blue square", "change the red circle to a blue square"),
        ([RED_CIRCLE, GREEN_TRIANGLE], "a red circle and a blue square", "change the green triangle to a blue square"),
        (
            [RED_CIRCLE, BLUE_SQUARE],
            "a red circle below a blue square",
            "move the red circle below the blue square",
        ),
        (
            [RED_CIRCLE, BLUE_SQUARE],
            "a blue square to the left of a red circle",
            "move the blue square to the left of the red circle",
        ),
        ([RED_CIRCLE, SceneObject("circle", "red", 44, 44, 8)], "a red circle", "remove a red circle"),
        (
            [RED_CIRCLE, SceneObject("circle", "red", 44, 44, 8)],
            "a red circle and a red square",
            "change a red circle to a red square",
        ),
        (
            [RED_CIRCLE, SceneObject("circle", "blue", 44, 44, 8)],
            "two red circles",
            "change the blue circle to red",
        ),
        (
            [RED_CIRCLE, SceneObject("circle", "red", 44, 20, 8), SceneObject("circle", "red", 32, 46, 8)],
            "two red circles",
            "remove a red circle",
        ),
        (
            [RED_CIRCLE, BLUE_SQUARE, GREEN_TRIANGLE],
            "a red circle",
            "remove the blue square; remove the green triangle",
        ),
    ],
)
def test_what_the_editor_is_told(objects, caption, told):
    image = picture(*objects)
    (instructions,) = INSTRUCTOR([image], [caption], CRITIC([image], [caption]))
    assert instructions.text in (told, "; ".join(reversed(told.split("; "))))


def test_a_malformed_piece_can_be_named():
    merged = [SceneObject("circle", "red", 28, 30, 8), SceneObject("square", "red", 38, 34, 8)]
    image = picture(*merged)
    (critique,) = CRITIC([image], ["a red circle"])
    assert critique.problems[0].what == "wrong shape: a red circle wanted, a red object of no known shape seen"
    (instructions,) = INSTRUCTOR([image], ["a red circle"], [critique])
    assert instructions.text == "change the red object to a red circle"


def test_every_critique_is_understood_and_every_instruction_is_one_of_the_editors():
    told = 0
    for image, caption in many_scenes():
        critiques = CRITIC([image], [caption])
        (instructions,) = INSTRUCTOR([image], [caption], critiques)
        if critiques[0].nothing_to_fix:
            assert instructions.is_empty
        elif not instructions.is_empty:
            told += 1
            edits = parse_edits(instructions.text)
            assert 1 <= len(edits) == len(instructions.instructions) <= MAX_EDITS
            assert not any(map(why_no_command, instructions.instructions))
    assert told > 80


def test_noise_leaves_nothing_to_say():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    (critique,) = CRITIC([noise], ["a red circle"])
    assert [problem.severity for problem in critique.problems] == [3] and critique.overall == 1 and not critique.keep
    (instructions,) = INSTRUCTOR([noise], ["a red circle"], [critique])
    assert instructions.is_empty


def test_the_instructor_follows_the_critique_and_not_the_caption():
    critique = Critique(problems=(Problem(what="missing: a green triangle", severity=3),), overall=3)
    (instructions,) = INSTRUCTOR([picture(RED_CIRCLE)], ["a red circle"], [critique])
    assert instructions.text == "add a green triangle"
    strange = Critique(problems=(Problem(what="the mood is off", severity=1),), overall=3)
    (fault,) = INSTRUCTOR([picture(RED_CIRCLE)], ["a red circle"], [strange])
    assert fault.kind == "invalid" and fault.message == (
        "the shapes instructor does not understand 'the mood is off'; use the shapes critic"
    )


def test_the_blind_instructor_knows_the_caption_only():
    blind = load_instructor(ChatConfig(kind="shapes-caption"))
    fine = Critique(problems=(), overall=10)
    image = picture(RED_CIRCLE)
    for prompt in sample_prompts("train", 40, 1):
        (instructions,) = blind([image], [prompt.text], [fine])
        assert parse_edits(instructions.text)
    captions = ["two red circles", "a red circle above a blue square", "a red circle and a blue square"]
    answers = blind([image] * 3, captions, [fine] * 3)
    assert [one.text for one in answers] == [
        "add a red circle; add a red circle",
        "move the red circle above the blue square",
        "add a red circle; add a blue square",
    ]


def test_the_judge_of_the_shapes_world():
    judge = load_judge(ChatConfig())
    right, wrong = picture(RED_CIRCLE), picture(BLUE_SQUARE)
    verdicts = judge([right, wrong, wrong], [wrong, right, picture()], ["a red circle"] * 3)
    assert verdicts == ["first", "second", "tie"]
    assert judge.identity == {"kind": "reward", "model": "shapes", "margin": "0.0", "orders": "both"}
    assert load_judge(ChatConfig(kind="reward", model="shapes")).identity == judge.identity
    with pytest.raises(ValueError, match="^the judge is a reward, but model is empty; give the name of a reward"):
        load_judge(ChatConfig(kind="reward"))


class OwnInstructor:
    identity = {"kind": "own"}
    batch_size = concurrency = 1

    def __init__(self, config):
        self.config = config

    def __call__(self, images, captions, critiques):
        return []


def test_kinds_of_ones_own_and_kinds_that_are_none():
    kind = f"{__name__}:OwnInstructor"
    own = load_instructor(ChatConfig(kind=kind, model="x"))
    assert type(own).__name__ == "OwnInstructor" and own.config.model == "x"
    nearest = rf"expected one of {', '.join(INSTRUCTORS)}, or package.module:attribute; the nearest is 'shapes'$"
    with pytest.raises(ValueError, match=f"^there is no instructor of kind 'shape'; {nearest}"):
        load_instructor(ChatConfig(kind="shape"))
    with pytest.raises(ValueError, match="^critic .*'no.such:thing' cannot be imported"):
        load_critic(ChatConfig(kind="no.such:thing"))
    with pytest.raises(ValueError, match="^critic 'rpo.shapes.prompts:SHAPES' is of type tuple; expected a class or f"):
        load_critic(ChatConfig(kind="rpo.shapes.prompts:SHAPES"))


def test_every_kind_of_prompt_was_among_the_scenes():
    assert {prompt.kind for prompt in sample_prompts("train", 200, 6)} == set(KINDS)


def carried_out(scene, edits, rng):
    """The scene after an ideal editor: everything said is done, and nothing else."""
    objects = list(scene.objects)
    for edit in edits:
        alike = [one for one in objects if (one.color, one.shape) == (edit.named.color, edit.named.shape)]
        old = alike[0] if alike else None
        if old:
            objects.remove(old)
        if edit.kind == "add":
            objects += [old] if old else []
            objects.append(placed(edit.named, objects, rng))
        elif edit.kind == "change":
            objects.append(replace(old, color=edit.new.color, shape=edit.new.shape))
        elif edit.kind == "move":
            (fixed,) = (one for one in objects if (one.color, one.shape) == (edit.other.color, edit.other.shape))
            objects.append(placed(edit.named, objects, rng, (fixed, DIRECTIONS[edit.relation])))
    return None if None in objects else replace(scene, objects=tuple(objects))


def placed(named, others, rng, relation=None):
    """An object where there is room, on the side that the relation says."""
    for _ in range(2000):
        x, y = rng.integers(10, 54, 2).tolist()
        is_free = all(one is None or np.hypot(x - one.x, y - one.y) > 20 for one in others)
        if relation:
            fixed, (right, down) = relation
            along = right * (x - fixed.x) + down * (y - fixed.y)
            is_free &= along > 15 and along > 1.2 * (abs(down * (x - fixed.x)) + abs(right * (y - fixed.y)))
        if is_free:
            return SceneObject(named.shape, named.color, x, y, 7)
    return None


def test_what_the_editor_is_told_is_what_the_caption_lacks():
    rng = np.random.default_rng(3)
    wanted, shown = sample_prompts("train", 120, 8), sample_prompts("train", 120, 9)
    fixed = 0
    for prompt, other in zip(wanted, shown, strict=True):
        scene = draw_scene(other, rng)
        scene = replace(scene, objects=tuple(replace(one, radius=min(one.radius, 7.5)) for one in scene.objects))
        before = verify(render(scene), prompt)
        if before.holds:
            continue
        image = Image.fromarray(render(scene))
        (instructions,) = INSTRUCTOR([image], [prompt.text], CRITIC([image], [prompt.text]))
        edits = parse_edits(instructions.text)
        edited = carried_out(scene, edits, rng)
        if edited is None:  # no room, such as above an object at the upper edge
            continue
        after = verify(render(edited), prompt)
        assert after.score > before.score, (prompt.text, other.text, instructions.text)
        fixed += after.holds
    assert fixed > 60
