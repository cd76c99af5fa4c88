import itertools
import time
from collections import Counter

import numpy as np
import pytest

from rpo.shapes import world
from rpo.shapes.world import (
    BACKGROUND_RANGE,
    COLORS,
    DIRECTIONS,
    IMAGE_SIZE,
    KIND_WEIGHTS,
    MIN_GAP,
    MIN_SEPARATION,
    RADII,
    SHAPES,
    UNIT_AREA,
    ObjectType,
    Scene,
    SceneObject,
    draw_scene,
    parse_prompt,
    prompts,
    render,
    sample_prompts,
    training_scenes,
)


def test_colors_are_far_apart_and_far_from_every_background():
    distances = [np.linalg.norm(np.subtract(a, b)) for a, b in itertools.combinations(COLORS.values(), 2)]
    assert min(distances) > 165
    for value, color in itertools.product(BACKGROUND_RANGE, COLORS.values()):
        assert np.linalg.norm(np.subtract(color, value)) > 165


def test_scenes_show_exactly_what_the_prompt_wants():
    rng = np.random.default_rng(0)
    for prompt in sample_prompts("train", 200, seed=0) + sample_prompts("out_of_domain", 200, seed=0):
        scene = draw_scene(prompt, rng)
        assert tuple(ObjectType(item.color, item.shape) for item in scene.objects) == prompt.wanted
        smallest, largest = RADII[len(scene.objects)]
        assert all(smallest <= item.radius <= largest for item in scene.objects)
        assert all(BACKGROUND_RANGE[0] <= value <= BACKGROUND_RANGE[1] for value in scene.background)


def test_objects_keep_their_distance_from_each_other_and_from_the_edge():
    rng = np.random.default_rng(1)
    for prompt in sample_prompts("train", 120, seed=1):
        scene = draw_scene(prompt, rng)
        points = [np.argwhere(_painted(Scene((item,), scene.background), min_coverage=0.5)) for item in scene.objects]
        for pixels in points:
            assert 1 <= pixels.min() <= pixels.max() <= IMAGE_SIZE - 2
        for one, other in itertools.combinations(points, 2):
            nearest = np.linalg.norm(one[:, None] - other[None], axis=-1).min()
            assert nearest >= MIN_GAP


@pytest.mark.parametrize("relation", DIRECTIONS)
def test_relations_are_clear(relation):
    rng = np.random.default_rng(2)
    for prompt in [prompt for prompt in prompts("train") if prompt.relation == relation][:60]:
        first, second = draw_scene(prompt, rng).objects
        along_x, along_y = first.x - second.x, first.y - second.y
        along, across = (along_y, along_x) if relation in ("above", "below") else (along_x, along_y)
        sign = -1 if relation in ("above", "to the left of") else 1
        assert sign * along >= MIN_SEPARATION
        assert abs(across) < sign * along


def test_scenes_vary():
    rng = np.random.default_rng(3)
    scenes = [draw_scene(parse_prompt("a red circle"), rng) for _ in range(200)]
    positions = np.array([(scene.objects[0].x, scene.objects[0].y) for scene in scenes])
    assert len(set(scenes)) > 195
    assert (positions.mean(axis=0) == pytest.approx([31.5, 31.5], abs=3)) and positions.std(axis=0).min() > 8
    assert {scene.objects[0].radius for scene in scenes} == set(np.arange(7.5, 11.1, 0.5))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("x", "y", "radius"), [(32, 32, 7), (20, 40, 11), (30.25, 31.6, 8.3)])
def test_objects_have_their_area_and_centre_of_mass(shape, x, y, radius):
    image = render(Scene((SceneObject(shape, "red", x, y, radius),)))
    coverage = (242 - image[..., 1].astype(float)) / (242 - COLORS["red"][1])
    rows, columns = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    assert coverage.sum() == pytest.approx(UNIT_AREA[shape] * radius**2, rel=0.02)
    assert (coverage * columns).sum() / coverage.sum() == pytest.approx(x, abs=0.1)
    assert (coverage * rows).sum() / coverage.sum() == pytest.approx(y, abs=0.1)


def test_shapes_have_their_outline():
    red = np.array(COLORS["red"])
    circle, square, triangle = (
        (render(Scene((SceneObject(shape, "red", 32, 32, 10),))) == red).all(axis=-1) for shape in SHAPES
    )
    assert circle[32, 23] and circle[23, 32] and not circle[24, 24]
    assert square[32, 24] and square[24, 24] and square[40, 40] and not square[32, 22]
    assert triangle[21:38, 32].all() and triangle[38, 22:43].all() and not triangle[30, 22] and not triangle[40, 32]
    assert (triangle == triangle[:, ::-1][:, np.r_[63, 0:63]]).all()  # mirror image about column 32


def test_inner_pixels_are_exact_and_later_objects_lie_on_top():
    below, above = SceneObject("square", "green", 30, 30, 10), SceneObject("circle", "magenta", 34, 30, 7)
    image = render(Scene((below, above), background=(240, 241, 242)))
    assert image.dtype == np.uint8 and image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert tuple(image[30, 34]) == COLORS["magenta"]
    assert tuple(image[30, 23]) == COLORS["green"]
    assert tuple(image[0, 0]) == (240, 241, 242)


def test_what_lies_outside_the_image_is_cut_off():
    whole = _painted(Scene((SceneObject("circle", "red", 32, 32, 9),)))
    for x, y in [(0, 32), (63, 32), (32, 0), (32, 63), (0, 63)]:
        part = _painted(Scene((SceneObject("circle", "red", x, y, 9),)))
        shifted = np.roll(whole, (y - 32, x - 32), axis=(0, 1))
        rows, columns = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
        is_near = (abs(rows - y) < 20) & (abs(columns - x) < 20)
        np.testing.assert_array_equal(part, shifted & is_near)
    assert not _painted(Scene((SceneObject("circle", "red", 90, 32, 9),))).any()


def test_training_scenes_are_what_their_captions_say():
    images, captions = training_scenes(seed=5, count=300)
    known = {prompt.text for prompt in prompts("train") + prompts("in_domain")}
    assert images.shape == (300, IMAGE_SIZE, IMAGE_SIZE, 3) and images.dtype == np.uint8
    assert set(captions) <= known
    for image, caption in zip(images, captions, strict=True):
        wanted = {named.color for named in parse_prompt(caption).wanted}
        assert {name for name, value in COLORS.items() if (image == value).all(axis=-1).sum() > 50} == wanted


def test_training_scenes_mix_the_kinds_by_weight():
    _, captions = training_scenes(seed=6, count=3000)
    kinds = Counter(parse_prompt(caption).kind for caption in captions)
    for kind, weight in KIND_WEIGHTS.items():
        assert kinds[kind] / 3000 == pytest.approx(weight / sum(KIND_WEIGHTS.values()), abs=0.035)  # four deviations
    relations = Counter(parse_prompt(caption).relation for caption in captions)
    assert min(relations[relation] for relation in DIRECTIONS) > 150


def test_training_scenes_depend_on_the_seed_alone():
    images, captions = training_scenes(seed=7, count=40)
    more_images, more_captions = training_scenes(seed=7, count=60)
    other_images, _ = training_scenes(seed=8, count=40)
    np.testing.assert_array_equal(images, more_images[:40])
    assert captions == more_captions[:40]
    assert (images != other_images).any()


@pytest.mark.slow  # by the clock: for an idle machine
def test_a_training_set_takes_well_under_a_minute():
    training_scenes(seed=9, count=200)  # draws the masks
    start = time.process_time()
    training_scenes(seed=9, count=2000)
    assert (time.process_time() - start) * 25_000 / 2000 < 30


def test_three_of_the_largest_objects_fit():
    for shape in SHAPES:
        reach = world.REACH[shape] * RADII[3][1]
        free = IMAGE_SIZE - 1 - 2 * (reach + world.EDGE_MARGIN + 1)
        assert 2 * reach + MIN_GAP < 1.035 * free  # the largest least distance of three points in a square of side 1


def _painted(scene, min_coverage=0.01):
    (item, *_) = scene.objects
    offset = render(scene).astype(float) - scene.background
    whole = np.subtract(COLORS[item.color], scene.background)
    return offset @ whole >= min_coverage * (whole @ whole)
