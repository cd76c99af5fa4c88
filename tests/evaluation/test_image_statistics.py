"""What images look like, against values that are known."""

import math

import pytest
import torch

from rpo.evaluation.image_statistics import (
    STATISTICS,
    embedding_diversity,
    image_statistics,
    pixel_diversity,
)
from rpo.randomness import keyed_generator

SIDE = 32


def noise(count: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=keyed_generator("noise", 0))


def of_colour(red: float, green: float, blue: float) -> torch.Tensor:
    return torch.tensor([red, green, blue], dtype=torch.float32)[None, :, None, None].expand(1, 3, SIDE, SIDE).clone()


def waves(pixels_each: int) -> torch.Tensor:
    """Grey stripes, each wave so many pixels wide."""
    light = 0.5 + 0.5 * torch.cos(2 * math.pi * torch.arange(SIDE) / pixels_each)
    return light.expand(1, 3, SIDE, SIDE).clone()


def test_saturation_is_that_of_pure_colours_and_of_greys():
    assert STATISTICS["saturation"](of_colour(1, 0, 0)).item() == 1
    assert STATISTICS["saturation"](of_colour(0.3, 0.3, 0.3)).item() == 0
    assert STATISTICS["saturation"](of_colour(0.75, 0.5, 0.25)).item() == pytest.approx(0.5)


def test_colour_entropy_counts_bits():
    one, four = of_colour(0.2, 0.5, 0.9), of_colour(0, 0, 0)
    four[:, 0, : SIDE // 2], four[:, 1, :, : SIDE // 2] = 1, 1  # a quarter of the image each
    assert STATISTICS["colour_entropy"](one).item() == 0
    assert STATISTICS["colour_entropy"](four).item() == pytest.approx(2)
    assert 8 < STATISTICS["colour_entropy"](noise()).mean().item() < 9


def test_edges_are_where_brightness_jumps():
    halves = of_colour(0, 0, 0)
    halves[..., SIDE // 2 :] = 1
    inner = SIDE - 2
    assert STATISTICS["edge_density"](halves).item() == pytest.approx(2 / inner)  # both columns beside the jump
    assert STATISTICS["edge_density"](of_colour(0.4, 0.4, 0.4)).item() == 0


def test_sharpness_is_the_laplacian_of_a_wave():
    found = STATISTICS["sharpness"](waves(8)).item()
    factor = 2 - 2 * math.cos(2 * math.pi / 8)  # the eigenvalue of the second difference
    inner = 0.5 * torch.cos(2 * math.pi * torch.arange(1, SIDE - 1) / 8)
    assert found == pytest.approx(factor * inner.square().mean().sqrt().item(), rel=1e-4)


def test_what_is_fine_is_finer_than_four_pixels():
    assert STATISTICS["high_frequency"](waves(2)).item() == pytest.approx(1)
    assert STATISTICS["high_frequency"](waves(8)).item() == pytest.approx(0, abs=1e-6)
    assert STATISTICS["high_frequency"](of_colour(0.2, 0.7, 0.1)).item() == 0
    assert STATISTICS["high_frequency"](noise(16)).mean().item() == pytest.approx(0.75, abs=0.05)


def test_images_too_small_for_a_difference_have_none():
    found = image_statistics(torch.rand(2, 3, 1, 2, generator=keyed_generator("tiny", 0)))
    assert found["edge_density"].tolist() == found["sharpness"].tolist() == [0, 0]
    assert all(values.isfinite().all() for values in found.values())


def test_every_image_is_looked_at_by_itself():
    images = torch.cat([noise(2), of_colour(1, 0, 0), waves(4)])
    together = image_statistics(images)
    for row in range(len(images)):
        alone = image_statistics(images[row : row + 1])
        for name, values in together.items():
            torch.testing.assert_close(values[row : row + 1], alone[name])


def test_pixel_diversity_is_the_distance_of_two_images():
    pair = torch.cat([of_colour(0, 0, 0), of_colour(0.6, 0.6, 0.6)])
    assert pixel_diversity(pair, 2).item() == pytest.approx(0.6, rel=1e-5)
    assert pixel_diversity(torch.cat([pair[:1], pair[:1]]), 2).item() == 0
    groups = torch.cat([noise(4), of_colour(1, 1, 1).repeat(4, 1, 1, 1)])
    images = groups[:4].flatten(1)
    squares = [(images[i] - images[j]).square().mean() for i in range(4) for j in range(i)]
    expected = torch.stack(squares).mean().sqrt()
    torch.testing.assert_close(pixel_diversity(groups, 4), torch.stack([expected, torch.tensor(0.0)]))


def test_embedding_diversity_is_the_mean_over_pairs():
    vectors = torch.nn.functional.normalize(torch.randn(6, 5, generator=keyed_generator("vectors", 0)), dim=-1)
    expected = torch.stack(
        [torch.stack([1 - one[i] @ one[j] for i in range(3) for j in range(i)]).mean() for one in vectors.split(3)]
    )
    torch.testing.assert_close(embedding_diversity(vectors, 3), expected)
