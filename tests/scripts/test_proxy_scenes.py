import numpy as np
import pytest

from rpo.shapes.prompts import HELD_OUT_COMBINATIONS, ObjectType, parse_prompt, prompts
from rpo.shapes.reader import read_scene
from rpo.shapes.verifier import judge, verify
from rpo.shapes.world import Scene, SceneObject
from scripts.shapes.proxy_scenes import EDITS, FAMILY_SIZE, draw_families, draw_family, known_prompts, true_captions

COUNT = 60


@pytest.fixture(scope="module")
def families():
    return draw_families(3, COUNT)


def test_the_first_of_a_family_shows_its_prompt_and_the_others_do_not(families):
    assert len(families.prompts) == COUNT
    assert families.images.shape == (COUNT * FAMILY_SIZE, 64, 64, 3)
    for index, image in enumerate(families.images):
        assert verify(image, families.prompts[index // FAMILY_SIZE]).holds == (index % FAMILY_SIZE == 0)


def test_captions_are_what_the_verifier_finds_in_the_pixels(families):
    generator = np.random.default_rng(0)
    known = known_prompts()
    wrong: list[bool] = []
    for index, (image, captions) in enumerate(zip(families.images, families.captions, strict=True)):
        seen = read_scene(image)
        assert all(judge(seen, parse_prompt(caption)).holds for caption in captions)
        first = index - index % FAMILY_SIZE
        others = {caption for some in families.captions[first : first + FAMILY_SIZE] for caption in some}
        others |= {known[pick].text for pick in generator.integers(len(known), size=8)}
        wrong += [judge(seen, parse_prompt(caption)).holds for caption in others - set(captions)]
    assert len(wrong) > 8 * len(families.images)
    assert not any(wrong)


def test_some_near_misses_have_no_caption_and_most_have(families):
    share = np.mean([not captions for captions in families.captions])
    assert 0.05 < share < 0.3
    assert all(families.captions[::FAMILY_SIZE])


def test_nothing_is_out_of_domain(families):
    known = {prompt.text for prompt in known_prompts()}
    assert known.isdisjoint(prompt.text for prompt in prompts("out_of_domain"))
    pairings = {prompt.objects for prompt in known_prompts() if prompt.kind == "conjunction"}
    for image, captions in zip(families.images, families.captions, strict=True):
        assert known.issuperset(captions)
        seen = [ObjectType(item.color or "", item.shape or "") for item in read_scene(image).objects]
        assert HELD_OUT_COMBINATIONS.isdisjoint(seen)
        assert all(one == other or (one, other) in pairings for one in seen for other in seen)


def test_a_family_shares_its_layout(families):
    scenes = draw_family(known_prompts()[-1], np.random.default_rng(0))
    assert len({scene.background for scene in scenes}) == 1
    first = scenes[0]
    for scene in scenes[1:]:
        kept = len(set(scene.objects) & set(first.objects))
        is_swapped = {(item.x, item.y) for item in scene.objects} == {(item.x, item.y) for item in first.objects}
        assert kept >= len(first.objects) - 1 or is_swapped


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_changes_only_what_it_says(edit):
    scene = Scene((SceneObject("circle", "red", 15, 15, 8), SceneObject("square", "green", 45, 45, 8)))
    generator = np.random.default_rng(0)
    made = [edit(scene, generator) for _ in range(30)]
    colors, shapes, places = (
        {tuple(sorted(str(getattr(item, field)) for item in objects)) for objects in made}
        for field in ("color", "shape", "x")
    )
    several = {"_recolored": (True, False, False), "_reshaped": (False, True, False), "_moved": (False, False, True)}
    if edit.__name__ in several:
        assert tuple(len(values) > 1 for values in (colors, shapes, places)) == several[edit.__name__]
    else:
        sizes = {"_with_one_taken": {1}, "_with_one_added": {3}, "_with_two_swapped": {2}}
        assert {len(objects) for objects in made} == sizes[edit.__name__]
    if edit.__name__ == "_with_two_swapped":
        assert made[0] == [SceneObject("circle", "red", 45, 45, 8), SceneObject("square", "green", 15, 15, 8)]


def test_captions_of_a_scene():
    left = SceneObject("circle", "red", 16, 32, 8)
    assert true_captions(Scene((left,))) == ["a red circle"]
    two = Scene((left, SceneObject("circle", "red", 48, 32, 8)))
    assert true_captions(two) == ["two red circles"]
    beside = Scene((left, SceneObject("square", "green", 48, 30, 8)))
    assert sorted(true_captions(beside)) == [
        "a green square and a red circle",
        "a green square to the right of a red circle",
        "a red circle and a green square",
        "a red circle to the left of a green square",
    ]
    assert true_captions(Scene((left, left, SceneObject("square", "green", 48, 30, 8)))) == []


def test_a_longer_draw_starts_with_the_shorter_one(families):
    again = draw_families(3, 5)
    assert np.array_equal(again.images, families.images[: 5 * FAMILY_SIZE])
    assert again.captions == families.captions[: 5 * FAMILY_SIZE]
    assert again.prompts == families.prompts[:5]
    assert draw_families(4, 5).prompts != again.prompts
