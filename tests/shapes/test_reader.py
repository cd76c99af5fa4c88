"""Adversarial pictures: whatever is not a clean scene must not pass for one."""

import numpy as np
import pytest
from scipy import ndimage

from rpo.shapes.verifier import PARTIAL_CREDIT, judge, read_scene, verify
from rpo.shapes.world import COLORS, IMAGE_SIZE, SHAPES, SQUARE_HALF_SIDE, draw_scene, prompts, render, sample_prompts
from tests.shapes.pictures import BACKGROUND, BLUE_SQUARE, RED_CIRCLE, degrade, picture

ROWS, COLUMNS = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
EVERYTHING = prompts("train") + prompts("in_domain") + prompts("out_of_domain")


def test_positions_are_read_to_half_a_pixel():
    rng = np.random.default_rng(12)
    for prompt in sample_prompts("train", 60, 12):
        drawn = draw_scene(prompt, rng)
        read = read_scene(degrade(render(drawn), rng)).objects
        for item in drawn.objects:
            nearest = min(read, key=lambda other: np.hypot(other.x - item.x, other.y - item.y))  # noqa: B023
            assert (nearest.color, nearest.shape) == (item.color, item.shape)
            assert np.hypot(nearest.x - item.x, nearest.y - item.y) < 0.5


@pytest.mark.parametrize(("gap", "number"), [(-3, 1), (0, 1), (3, 2)])
@pytest.mark.parametrize("shape", ["circle", "square"])
def test_touching_objects_of_one_color_are_not_two(shape, gap, number):
    half = 8 if shape == "circle" else 8 * SQUARE_HALF_SIDE
    image = picture((shape, "red", 20, 32, 8), (shape, "red", 20 + 2 * half + gap, 32, 8))
    scene = read_scene(image)
    assert len(scene.objects) == number
    assert verify(image, f"two red {shape}s").holds == (number == 2)
    assert not verify(image, f"a red {shape}").holds


def test_neighbours_of_one_color_do_not_spoil_each_other():
    image = picture(("triangle", "red", 26, 36, 11), ("circle", "red", 42, 23, 7))
    assert sorted(map(str, read_scene(image).objects)) == ["red circle", "red triangle"]


def test_touching_objects_of_two_colors_are_told_apart():
    image = picture(("square", "red", 24, 32, 8), ("circle", "blue", 39.5, 32, 8))
    assert verify(image, "a red square to the left of a blue circle").holds


@pytest.mark.parametrize("spoil", [lambda image, rng: image, degrade], ids=["sharp", "blurred"])
@pytest.mark.parametrize("color", ["red", "cyan"])
@pytest.mark.parametrize("shape", SHAPES)
def test_half_an_object_is_not_an_object(shape, color, spoil):
    rng = np.random.default_rng(14)
    halves = [ROWS < 32, COLUMNS > 32, COLUMNS < 32, ROWS > COLUMNS, ROWS + COLUMNS > 64]
    if shape != "triangle":  # whose upper part is a whole triangle again
        halves.append(ROWS > 32)
    for radius in (7.5, 9, 11):
        for missing in halves:
            image = picture((shape, color, 32, 32, radius))
            image[missing] = BACKGROUND
            verdict = verify(spoil(image, rng), f"a {color} {shape}")
            assert not verdict.holds
            assert verdict.score <= PARTIAL_CREDIT


@pytest.mark.parametrize("shape", SHAPES)
def test_an_object_cut_by_the_edge_of_the_image_does_not_hold(shape):
    for x, y in [(0, 32), (63, 32), (32, 0)]:
        assert not verify(picture((shape, "red", x, y, 10)), f"a red {shape}").holds


@pytest.mark.parametrize("thickness", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_outline_is_not_a_filled_object(shape, thickness):
    for radius in (8, 10, 11):
        image = _hollow(shape, radius, thickness)
        assert not verify(image, f"a red {shape}").holds
        beside = np.where((picture(BLUE_SQUARE) != BACKGROUND), picture(BLUE_SQUARE), image)
        assert not verify(beside, "a blue square").holds  # nor is it nothing


def _hollow(shape, radius, thickness):
    inner = (picture((shape, "red", 20, 20, max(radius - thickness, 3))).astype(float) - BACKGROUND) / (
        np.array(COLORS["red"]) - BACKGROUND
    )
    image = picture((shape, "red", 20, 20, radius)).astype(float)
    return np.rint(image + inner * (BACKGROUND - image)).astype(np.uint8)


def test_a_hole_of_another_color_spoils_an_object():
    image = picture(("square", "red", 32, 32, 10))
    image[30:34, 30:34] = COLORS["green"]
    assert verify(image, "a red square").reason == (
        "wrong shape: a red square wanted, a red object of no known shape seen; "
        "extra object: a green object of no known shape"
    )


@pytest.mark.parametrize(
    "recolor",
    [
        pytest.param(lambda own, other: own + 0.5 * (other - own), id="between two hues"),
        pytest.param(lambda own, other: np.full(3, own.mean()), id="grey"),
        pytest.param(lambda own, other: own + 0.5 * (BACKGROUND - own), id="pale"),
        pytest.param(lambda own, other: own * 0.3, id="dark"),
        pytest.param(lambda own, other: other, id="another color"),
    ],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_wrong_hue_does_not_hold(shape, recolor):
    for name, value in COLORS.items():
        image = picture((shape, name, 32, 32, 10)).astype(float)
        coverage = (image - BACKGROUND) @ np.subtract(value, BACKGROUND)
        coverage /= coverage.max()
        for other in set(COLORS) - {name}:
            hue = recolor(np.array(value, float), np.array(COLORS[other], float))
            spoiled = np.rint(BACKGROUND + coverage[..., None] * (hue - BACKGROUND)).astype(np.uint8)
            verdict = verify(spoiled, f"a {name} {shape}")
            assert not verdict.holds
            assert verdict.score <= PARTIAL_CREDIT


@pytest.mark.parametrize("value", [0, 120, 190, 205])
def test_a_gray_smear_beside_the_object_counts(value):
    image = picture(RED_CIRCLE)
    image[40:46, 10:50] = value
    verdict = verify(image, "a red circle")
    assert verdict.score == pytest.approx(1 / 2)
    assert verdict.reason == "extra object: a strangely coloured object of no known shape"
    assert verify(image, "a blue square").score == 0


def test_a_smear_of_the_right_color_is_not_the_object():
    image = picture()
    image[28:34, 10:50] = COLORS["red"]
    for shape in SHAPES:
        assert verify(image, f"a red {shape}").score == PARTIAL_CREDIT


def test_merged_blobs_are_one_object_of_no_shape():
    image = picture(("circle", "red", 26, 30, 8), ("circle", "red", 36, 30, 8), ("circle", "red", 31, 38, 8))
    assert [str(item) for item in read_scene(image).objects] == ["red object of no known shape"]
    assert not verify(image, "three red circles").holds


def test_a_speck_is_forgiven_and_confetti_is_not():
    image = picture(RED_CIRCLE)
    image[50:53, 50:53] = COLORS["blue"]
    assert verify(image, "a red circle").holds
    image[40:62:6, 4:60:6] = COLORS["blue"]
    image[41:63:6, 4:60:6] = COLORS["blue"]
    assert verify(image, "a red circle").reason == "extra object: a strangely coloured object of no known shape"


def test_a_thin_slanted_line_is_an_object():
    image = picture(RED_CIRCLE)
    image[range(30, 60), range(30, 60)] = COLORS["blue"]
    assert verify(image, "a red circle").reason == "extra object: a blue object of no known shape"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("coverage", [0.5, 0.52, 0.55, 0.57, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("is_slanted", [False, True])
def test_a_faint_line_of_one_pixel_has_a_place_and_an_area(coverage, is_slanted):
    image = picture()
    rows = range(20, 50) if is_slanted else 30
    background, color = image[0, 0].astype(float), np.array(COLORS["red"], float)
    image[rows, range(10, 40)] = np.rint(background + coverage * (color - background))
    (found,) = read_scene(image).objects
    assert (found.x, found.y) == pytest.approx((24.5, 34.5 if is_slanted else 30))
    assert 7 < found.area <= 30 and found.shape is None


def test_too_small_and_too_large_objects_do_not_hold():
    for shape in SHAPES:
        assert not verify(picture((shape, "red", 32, 32, 4.5)), f"a red {shape}").holds
        assert not verify(picture((shape, "red", 32, 34, 17)), f"a red {shape}").holds


def _noise_images():
    rng = np.random.default_rng(15)
    size = (IMAGE_SIZE, IMAGE_SIZE, 3)
    for _ in range(6):
        smooth = ndimage.gaussian_filter(rng.normal(size=size), (6, 6, 0))
        yield "uniform", rng.uniform(0, 255, size)
        yield "bright uniform", rng.uniform(170, 255, size)
        yield "gaussian", rng.normal(128, 60, size)
        yield "light gaussian", rng.normal(242, 60, size)
        yield "smooth", 128 + 60 * smooth / smooth.std()
        yield "light and smooth", 225 + 25 * smooth / smooth.std()
        yield "stripes", np.broadcast_to(np.where(ROWS[..., None] % 8 < 4, 240, rng.uniform(0, 255, 3)), size)


NOISE_IMAGES = [(name, np.rint(image.clip(0, 255)).astype(np.uint8)) for name, image in _noise_images()]


@pytest.mark.parametrize("image", [image for _, image in NOISE_IMAGES], ids=[name for name, _ in NOISE_IMAGES])
def test_noise_scores_nothing(image):
    scene = read_scene(image)
    for prompt in sample_prompts("train", 200, 0):
        verdict = judge(scene, prompt)
        assert not verdict.holds
        assert verdict.score == 0


def test_noise_on_a_light_ground_is_no_background():
    light = [image for name, image in NOISE_IMAGES if name == "light gaussian"]
    assert len(light) == 6
    assert not any(read_scene(image).has_background for image in light)


def test_blank_and_inverted_images_score_nothing():
    for value in (0, 30, 128, 220, 242, 255):
        blank = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), value, np.uint8)
        for prompt in EVERYTHING[::10]:
            assert verify(blank, prompt).score == 0
    rng = np.random.default_rng(16)
    for prompt in sample_prompts("train", 40, 16):
        verdict = verify(255 - render(draw_scene(prompt, rng)), prompt)
        assert verdict.score == 0
        assert verdict.reason == "unreadable: there is no light, even background to tell objects from"


def test_a_blank_image_misses_everything():
    blank = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), BACKGROUND, np.uint8)
    assert verify(blank, "a red circle above a blue square").reason == "missing: a red circle; missing: a blue square"
    assert verify(blank, "two red circles").reason == "two red circles wanted, none seen"
