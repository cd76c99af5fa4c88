"""MaPO and KTO: limits, formulas by hand, gradients."""

import math

import pytest
import torch

from rpo.objectives.preference.kto import kto_losses
from rpo.objectives.preference.mapo import mapo, odds


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_odds_have_their_limit_and_slope_at_zero_and_no_seam():
    at = numbers(0.0).requires_grad_()
    value = odds(at, slope=0.5)
    value.sum().backward()
    assert value.item() == 1
    assert at.grad.item() == pytest.approx(-0.25)
    around = numbers(1.9e-3, 2.1e-3)  # |s e| on both sides of where the series ends
    assert (odds(around, slope=0.5) - (1 - around / 4 + around**2 / 48)).abs().max() < 1e-13


@pytest.mark.parametrize("error", [1e-6, 0.01, 0.3, 2.0, 30.0])
def test_odds_are_the_formula(error):
    x = 0.5 * error
    assert odds(numbers(error), slope=0.5).item() == pytest.approx(x / math.expm1(x), rel=1e-12)


def test_odds_in_single_precision_are_exact_near_zero():
    errors = torch.logspace(-8, 0, 50)
    torch.testing.assert_close(odds(errors, slope=0.5).double(), odds(errors.double(), slope=0.5), rtol=3e-7, atol=0)


def test_mapo_is_its_formula_and_its_gradient():
    chosen, rejected = numbers(0.1, 0.02, 0.0), numbers(0.12, 0.01, 0.3)
    out = mapo(chosen, rejected, beta=0.1, slope=0.5, temperature=100.0)
    favour = 100.0 * (odds(chosen, slope=0.5) - odds(rejected, slope=0.5))
    torch.testing.assert_close(out.sample_losses, chosen - 0.1 * torch.log(torch.sigmoid(favour)))
    assert out.metrics["dpo/implicit_accuracy"].item() == pytest.approx(2 / 3)
    inputs = (numbers(0.1, 0.02, 0.4).requires_grad_(), rejected.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda *both: mapo(*both, temperature=20.0).loss, inputs)


def test_mapo_without_the_odds_is_denoising():
    chosen = numbers(0.1, 0.2)
    assert torch.equal(mapo(chosen, numbers(0.3, 0.1), beta=0.0).sample_losses, chosen)


@pytest.mark.parametrize("changes", [{"beta": -0.1}, {"slope": 0.0}, {"temperature": 0.0}])
def test_mapo_refuses_numbers_out_of_range(changes):
    with pytest.raises(ValueError, match=r"but beta must be >= 0 and the others > 0"):
        mapo(numbers(0.1), numbers(0.1), **changes)


LABELS = torch.tensor([True, False, True])


def test_kto_is_its_formula():
    error, reference = numbers(0.1, 0.2, 0.3), numbers(0.15, 0.1, 0.32)
    gain = [0.05, -0.1, 0.02]
    kl = max(0, sum(gain) / 3)
    assert kl == 0
    expected = [2 * (1 - 1 / (1 + math.exp(-s * 10 * (g - kl)))) for s, g in zip((1, -1, 1), gain, strict=True)]
    expected[1] /= 4
    losses = kto_losses(error, reference, LABELS, beta=10.0, desirable_weight=2.0, undesirable_weight=0.5)
    assert losses.tolist() == pytest.approx(expected)


def test_kto_baseline_is_clamped_and_carries_no_gradient():
    reference = numbers(0.15, 0.1, 0.32)
    for baseline, kl in ((None, 0.03), (0.01, 0.01), (-1.0, 0.0)):
        error = (reference - numbers(0.05, 0.02, 0.02)).requires_grad_()
        losses = kto_losses(error, reference, LABELS, beta=10.0, baseline=baseline)
        by_hand = kto_losses(error.detach(), reference, LABELS, beta=10.0, baseline=kl)
        torch.testing.assert_close(losses, by_hand)
        (gradient,) = torch.autograd.grad(losses.sum(), error)
        value = losses.detach()
        signs = numbers(1, -1, 1)
        torch.testing.assert_close(gradient, signs * 10.0 * value * (1 - value))


def test_kto_starts_at_one_half_and_wants_good_images_denoised_better():
    error = numbers(0.1, 0.2, 0.3).requires_grad_()
    losses = kto_losses(error, error.detach(), LABELS, beta=10.0)
    assert losses.tolist() == [0.5, 0.5, 0.5]
    losses.sum().backward()
    assert error.grad.sign().tolist() == [1, -1, 1]


@pytest.mark.parametrize(
    ("changes", "message"), [({"beta": 0.0}, "beta is 0.0"), ({"undesirable_weight": -1.0}, "undesirable_weight -1.0")]
)
def test_kto_refuses_numbers_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        kto_losses(numbers(0.1), numbers(0.1), torch.tensor([True]), **{"beta": 1.0} | changes)
