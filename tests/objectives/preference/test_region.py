"""The mask of a region: its range, its reach, and its limits."""

import pytest
import torch

from rpo.objectives.preference.region import region_mask


def spot(size=8, value=0.5):
    difference = torch.zeros(1, size, size)
    difference[0, 3, 4] = value
    return difference


@pytest.mark.parametrize("floor", [0.0, 0.1, 0.3, 0.7])
def test_a_region_weighs_exactly_one(floor):
    assert region_mask(spot(), floor=floor, full_at=0.1, soften=1)[0, 0, 3, 4] == 1


@pytest.mark.parametrize("soften", [0, 1, 2])
def test_a_spot_is_full_at_its_place_and_fades_around_it(soften):
    mask = region_mask(spot(), floor=0.1, full_at=0.1, soften=soften)[0, 0]
    assert mask[3, 4] == 1
    touched = (mask > 0.1 + 1e-6).nonzero()
    assert len(touched) == (2 * soften + 1) ** 2
    assert (touched - torch.tensor([3, 4])).abs().max() == soften
    around = mask[3 - soften, 4]
    assert around == pytest.approx(0.1 + 0.9 / (2 * soften + 1) ** 2) if soften else around == 1


def test_beyond_the_border_it_goes_on_as_at_the_border():
    """So that a region at the border fades as slowly along it as one in the middle does across it."""
    difference = torch.zeros(1, 8, 8)
    difference[0, 0, 4] = 0.5
    mask = region_mask(difference, floor=0.1, full_at=0.1, soften=1)[0, 0]
    assert mask[0, 3].item() == pytest.approx(0.1 + 0.9 * 2 / 9)
    assert mask[1, 4].item() == pytest.approx(0.1 + 0.9 * 1 / 9)


def test_the_mask_is_between_floor_and_one_and_linear_below_full():
    difference = torch.linspace(0, 1, 64).view(1, 8, 8)
    mask = region_mask(difference, floor=0.2, full_at=0.5, soften=0)[0, 0]
    torch.testing.assert_close(mask, 0.2 + 0.8 * (difference[0] / 0.5).clamp(max=1))
    softened = region_mask(difference, floor=0.2, full_at=0.5, soften=2)
    assert softened.min() >= 0.2 - 1e-6
    assert softened.max() <= 1


def test_a_floor_of_one_and_images_that_differ_everywhere_are_a_full_mask():
    assert torch.equal(region_mask(spot(), floor=1.0, full_at=0.1, soften=1), torch.ones(1, 1, 8, 8))
    everywhere = torch.full((1, 8, 8), 0.3)
    assert torch.equal(region_mask(everywhere, floor=0.0, full_at=0.1, soften=1), torch.ones(1, 1, 8, 8))
