"""The endpoint gradient: which images still say something."""

import pytest
import torch

from rpo.objectives.endpoint.bound import endpoint


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("kl", "advantage", "expected"),
    [(0.9, 1.0, 1.0), (0.6, 1.0, 0.0), (1.5, 1.0, 1.0), (1.2, -1.0, -1.0), (1.5, -1.0, 0.0), (0.6, -1.0, -1.0)],
    ids=["pull", "pulled enough", "pull back", "push", "pushed enough", "push away again"],
)
def test_a_clipped_point_says_no_more_where_it_has_moved_far_enough(kl, advantage, expected):
    kl = torch.tensor([kl], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([1.0], dtype=torch.float64)
    loss = endpoint(kl, torch.tensor([advantage], dtype=torch.float64), reference_kl=reference, clip=0.3)
    (gradient,) = torch.autograd.grad(loss.sum(), kl)
    assert gradient.item() == expected


def test_a_wide_clip_changes_nothing():
    kl, advantage = randn(8).abs(), randn(8, seed=1)
    assert torch.equal(endpoint(kl, advantage), endpoint(kl, advantage, reference_kl=torch.ones(8), clip=1e9))
