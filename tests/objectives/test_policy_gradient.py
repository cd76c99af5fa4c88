"""Surrogates: one gradient where nothing has moved, none where the clip holds, and a step size that is kept."""

import math

import pytest
import torch

from rpo.objectives.policy_gradient import adapt_coefficient, clipped_surrogate, plain, trust_region

DIMS = 256
CLIP = 1e-3


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def gradient(surrogate, log_prob, *args, **settings):
    log_prob = log_prob.clone().requires_grad_()
    surrogate(log_prob, *args, num_dims=DIMS, **settings).loss.sum().backward()
    return log_prob.grad


def test_at_ratio_one_both_have_the_gradient_minus_advantage_and_the_loss_zero():
    old, advantage = numbers(-500.0, 3.0, 1e4), numbers(2.0, -1.5, 0.0)
    assert torch.equal(gradient(plain, old, old, advantage), -advantage)
    assert torch.equal(gradient(clipped_surrogate, old, old, advantage, clip=CLIP), -advantage)
    for out in (
        plain(old, old, advantage, num_dims=DIMS),
        clipped_surrogate(old, old, advantage, num_dims=9, clip=1.0),
    ):
        assert out.loss.tolist() == [0, 0, 0]
        assert out.ratio.tolist() == [1, 1, 1]
        assert not out.is_clipped.any()


def test_inside_the_range_it_is_the_ratio_per_dimension_times_the_dimensions():
    change, advantage = numbers(0.2, -0.2, 0.2, -0.2), numbers(2.0, 2.0, -2.0, -2.0)
    out = clipped_surrogate(change, torch.zeros_like(change), advantage, num_dims=DIMS, clip=CLIP)
    ratio = (change / DIMS).exp()
    assert torch.allclose(out.ratio, ratio, rtol=1e-15)
    assert torch.allclose(out.loss, -advantage * DIMS * (ratio - 1), rtol=1e-9)
    assert not out.is_clipped.any()
    grad = gradient(clipped_surrogate, change, torch.zeros_like(change), advantage, clip=CLIP)
    assert torch.allclose(grad, -advantage * ratio)


def test_the_clip_holds_gains_and_lets_mistakes_be_mended():
    # Of the joint log-ratio, 0.256 nats is the range; the four combinations of side and sign, beyond it.
    change, advantage = numbers(1.0, -1.0, 1.0, -1.0), numbers(2.0, -2.0, -2.0, 2.0)
    out = clipped_surrogate(change, torch.zeros_like(change), advantage, num_dims=DIMS, clip=CLIP)
    grad = gradient(clipped_surrogate, change, torch.zeros_like(change), advantage, clip=CLIP)
    assert out.is_clipped.tolist() == [True, True, False, False]
    assert grad[:2].tolist() == [0, 0]
    assert torch.allclose(grad[2:], -advantage[2:] * (change[2:] / DIMS).exp())
    held = numbers(-2.0 * CLIP, -2.0 * CLIP) * DIMS
    assert torch.allclose(out.loss[:2], held)
    assert (out.loss[2:] > 0).all()


def test_no_advantage_is_not_counted_as_clipped():
    out = clipped_surrogate(numbers(50.0), numbers(0.0), numbers(0.0), num_dims=DIMS, clip=CLIP)
    assert out.is_clipped.tolist() == [False]
    assert out.loss.tolist() == [0]


def test_float32_keeps_the_digits_of_a_ratio_near_one():
    change = torch.tensor([1e-3])  # 6e-8 per dimension of SD 1.5, less than float32 can add to 1
    out = clipped_surrogate(change, torch.zeros(1), torch.ones(1), num_dims=16_384, clip=1e-4)
    assert out.loss.item() == pytest.approx(-1e-3, rel=1e-5)


def test_no_gradient_reaches_the_old_policy_or_the_advantage():
    for surrogate, settings in ((plain, {}), (clipped_surrogate, {"clip": CLIP})):
        new, old, advantage = (numbers(0.1, -0.1).requires_grad_() for _ in range(3))
        out = surrogate(new, old, advantage, num_dims=DIMS, **settings)
        out.loss.sum().backward()
        assert new.grad is not None
        assert old.grad is None
        assert advantage.grad is None
        assert not out.ratio.requires_grad


def test_clip_must_be_positive():
    with pytest.raises(ValueError, match="clip is 0.0, but it must be > 0; 1e-4 is usual"):
        clipped_surrogate(numbers(0.0), numbers(0.0), numbers(1.0), num_dims=DIMS, clip=0.0)


def test_trust_region_is_the_root_of_the_kl():
    kl = numbers(0.04, 1.0).requires_grad_()
    penalty = trust_region(kl, 3.0)
    assert penalty.tolist() == pytest.approx([0.6, 3.0])
    (grad,) = torch.autograd.grad(penalty.sum(), kl)
    assert grad.tolist() == pytest.approx([3 / (2 * 0.2), 1.5], rel=1e-4)


def test_trust_region_is_finite_at_the_old_policy():
    shift = numbers(0.0).requires_grad_()
    (grad,) = torch.autograd.grad(trust_region(0.5 * shift**2, 3.0).sum(), shift)
    assert grad.tolist() == [0]


def test_trust_region_pulls_a_shift_with_constant_strength():
    """KL of a shift d is d²/2: the gradient is C / √2 whatever d."""
    shift = numbers(0.1, 1.0, 10.0).requires_grad_()
    (grad,) = torch.autograd.grad(trust_region(0.5 * shift**2, 2.0).sum(), shift)
    assert grad.tolist() == pytest.approx([math.sqrt(2)] * 3, rel=1e-4)


@pytest.mark.parametrize(
    ("sqrt_kl", "expected"), [(0.0221, 3.0), (0.0219, 2.0), (0.0181, 2.0), (0.0179, 2 / 1.5), (0.0, 2 / 1.5)]
)
def test_coefficient_follows_the_distance(sqrt_kl, expected):
    assert adapt_coefficient(2.0, sqrt_kl, target=0.02) == pytest.approx(expected)


def test_coefficient_stays_in_its_range():
    assert adapt_coefficient(9.0, 1.0, target=0.02) == 10
    assert adapt_coefficient(1.2e-8, 0.0, target=0.02) == 1e-8


def test_coefficient_finds_the_distance_wanted():
    """A policy that moves d = 1 / (1 + C) against a penalty C settles within one factor of the target."""
    coefficient = 1e-4
    for _ in range(100):
        coefficient = adapt_coefficient(coefficient, 1 / (1 + coefficient), target=0.2)
    assert 0.2 / 1.5 < 1 / (1 + coefficient) < 0.2 * 1.5


def test_a_distance_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="sqrt_kl is nan, but a distance is >= 0; look for a policy that has diverged"):
        adapt_coefficient(1.0, math.nan, target=0.02)
