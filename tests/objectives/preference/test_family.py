"""The preference family: exact reductions, gradients, and what its parts do to the optimum."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar

from rpo.objectives.preference.context_scale import mallows_scale
from rpo.objectives.preference.dpo import preference_loss, with_gradient_scaled
from rpo.objectives.preference.links import LINKS, smoothed_link
from rpo.objectives.preference.winner_preserving import winner_preserving_scale
from rpo.process.prediction import squared_error

BETA = 3.0


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def four_errors(batch=8, dtype=torch.float64):
    return [(randn(batch, seed=seed).abs() + 0.1).to(dtype) for seed in range(4)]


# Exact reductions: to the bit, in the precision of training.


def parts(batch=8):
    ones = torch.ones(batch)
    return {
        "time_weight": ones,
        "context_scale": ones,
        "rejected_gradient_scale": ones,
        "margin": torch.zeros(batch),
        "is_margin_mixed": True,
        "reference_weight": 1.0,
        "label_smoothing": 0.0,
        "link": "sigmoid",
    }


@pytest.mark.parametrize("name", [*parts(), "all"])
def test_neutral_parts_are_diffusion_dpo_to_the_bit(name):
    errors = [error.requires_grad_() for error in four_errors(dtype=torch.float32)]
    neutral = parts() if name == "all" else {name: parts()[name]}
    ours = preference_loss(*errors, beta=BETA, sft_weight=0.3, **neutral)
    plain = preference_loss(*errors, beta=BETA, sft_weight=0.3)
    assert torch.equal(ours.sample_losses, plain.sample_losses)
    assert all(torch.equal(ours.metrics[key], value) for key, value in plain.metrics.items())
    both = [torch.autograd.grad(out.loss, errors[:2]) for out in (ours, plain)]
    assert all(torch.equal(one, other) for one, other in zip(*both, strict=True))


def test_without_parts_it_is_equation_14_and_the_chosen_side_s_own_error():
    chosen, rejected, reference_chosen, reference_rejected = errors = four_errors(dtype=torch.float32)
    inside = -0.5 * BETA * ((chosen - reference_chosen) - (rejected - reference_rejected))
    expected = -F.logsigmoid(inside) + 0.2 * 0.5 * BETA * (chosen - reference_chosen)
    out = preference_loss(*errors, beta=BETA, sft_weight=0.2)
    assert torch.equal(out.sample_losses, expected)
    assert list(out.metrics) == [
        f"dpo/{name}"
        for name in (
            "loss",
            "implicit_accuracy",
            "margin",
            "chosen_error",
            "rejected_error",
            "reference_chosen_error",
            "reference_rejected_error",
            "chosen_error_ratio",
            "rejected_error_ratio",
        )
    ]


def test_without_reference_and_with_a_margin_it_is_simpo():
    chosen, rejected, *_ = four_errors(dtype=torch.float32)
    gamma = torch.full_like(chosen, 0.3)
    for is_mixed in (False, True):  # at alpha 0 the mixture is gamma in full
        out = preference_loss(chosen, rejected, beta=BETA, reference_weight=0.0, margin=gamma, is_margin_mixed=is_mixed)
        expected = -F.logsigmoid(-0.5 * BETA * (chosen - rejected) - BETA * gamma)
        assert torch.equal(out.sample_losses, expected)
    assert not [name for name in out.metrics if "reference" in name or "ratio" in name]


def test_with_a_scale_per_prompt_it_is_mallows_dpo():
    errors, scale = four_errors(dtype=torch.float32), torch.linspace(0.5, 2, 8)
    inside = -0.5 * BETA * ((errors[0] - errors[2]) - (errors[1] - errors[3]))
    out = preference_loss(*errors, beta=BETA, context_scale=scale)
    assert torch.equal(out.sample_losses, -F.logsigmoid(inside * scale))


def test_with_the_square_it_is_ipo():
    errors = four_errors(dtype=torch.float32)
    inside = -0.5 * BETA * ((errors[0] - errors[2]) - (errors[1] - errors[3]))
    assert torch.equal(preference_loss(*errors, beta=BETA, link="ipo").sample_losses, (inside - 0.5) ** 2)


def test_all_directions_together_are_the_unified_formula():
    chosen, rejected, reference_chosen, reference_rejected = errors = four_errors()
    weight, scale, gamma = (randn(8, seed=seed).abs() for seed in (5, 6, 7))
    alpha, smoothing = 0.25, 0.1
    z = weight * (-0.5 * (chosen - rejected) + 0.5 * alpha * (reference_chosen - reference_rejected))
    z = BETA * scale * (z - (1 - alpha) * gamma)
    expected = (1 - smoothing) * F.softplus(-z) + smoothing * F.softplus(z)
    expected += 0.2 * BETA / 2 * (chosen - alpha * reference_chosen)
    out = preference_loss(
        *errors,
        beta=BETA,
        time_weight=weight,
        margin=gamma,
        is_margin_mixed=True,
        reference_weight=alpha,
        context_scale=scale,
        label_smoothing=smoothing,
        sft_weight=0.2,
    )
    torch.testing.assert_close(out.sample_losses, expected, rtol=1e-12, atol=1e-12)
    assert out.metrics["dpo/home_advantage"].item() == pytest.approx((BETA * scale * 0.75 * gamma).mean().item())


# Links.


def test_links_are_their_formulas():
    z = torch.linspace(-4, 4, 33, dtype=torch.float64)
    formulas = {
        "sigmoid": -torch.log(1 / (1 + torch.exp(-z))),
        "ipo": (z - 0.5) ** 2,
        "hinge": torch.where(z < 1, 1 - z, 0.0),
        "square_hinge": torch.where(z < 0.5, (z - 0.5) ** 2, 0.0),
        "cauchy": -torch.log(0.5 + torch.atan(z) / math.pi),
        "linear": -z,
    }
    assert formulas.keys() == LINKS.keys()
    for name, expected in formulas.items():
        torch.testing.assert_close(LINKS[name](z), expected, rtol=1e-12, atol=1e-12)


def test_cauchy_does_not_cancel_far_out():
    far = torch.tensor([-1e6], requires_grad=True)  # float32: 1/2 + arctan / pi would be 0 and its logarithm infinite
    loss = LINKS["cauchy"](far)
    assert loss.item() == pytest.approx(math.log(math.pi * 1e6), rel=1e-6)
    loss.sum().backward()
    assert far.grad.item() == pytest.approx(-1e-6, rel=1e-3)


@pytest.mark.parametrize("link", LINKS)
def test_every_link_prefers_the_chosen_side_at_the_start(link):
    z = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    LINKS[link](z).sum().backward()
    assert -1 <= z.grad.item() <= -0.5


# Gradients by finite differences.


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradient_is_that_of_finite_differences(link, smoothing):
    chosen, rejected, *references = four_errors()
    weight, scale, gamma = (randn(8, seed=seed).abs() for seed in (5, 6, 7))

    def of(chosen, rejected):
        return preference_loss(
            chosen,
            rejected,
            *references,
            beta=BETA,
            link=link,
            time_weight=weight,
            margin=gamma,
            reference_weight=0.4,
            context_scale=scale,
            label_smoothing=smoothing,
            sft_weight=0.2,
        ).loss

    assert torch.autograd.gradcheck(of, (chosen.requires_grad_(), rejected.requires_grad_()))


# What the parts do to the optimum (labels that hold with probability sigmoid(R)).


def optimum(advantage_of_z, gap):
    p = 1 / (1 + math.exp(-gap))
    return minimize_scalar(
        lambda d: p * advantage_of_z(d) + (1 - p) * advantage_of_z(-d),
        bounds=(-30, 30),
        method="bounded",
        options={"xatol": 1e-9},
    ).x


def of_logit(logit, **settings):
    """The loss of one pair whose errors are those of the logit, by the real function."""
    errors = torch.tensor([[-2 * logit], [0.0], [0.0], [0.0]], dtype=torch.float64)
    return preference_loss(*errors, beta=1.0, **settings).loss.item()


@pytest.mark.parametrize("gap", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_a_margin_moves_the_optimum_as_derived(gap, gamma):
    best = optimum(lambda d: of_logit(d, margin=gamma), gap)
    rise, g = math.exp(gap), math.exp(-gamma)
    derived = math.log(((rise - 1) + math.sqrt((rise - 1) ** 2 + 4 * g**2 * rise)) / (2 * g))
    assert best == pytest.approx(derived, abs=1e-5)
    assert (abs(best - gap) < 1e-5) == (gamma == 0)


def test_far_from_ties_the_margin_is_added():
    assert optimum(lambda d: of_logit(d, margin=0.5), 8.0) == pytest.approx(8.5, abs=2e-3)


@pytest.mark.parametrize("gap", [-1.0, 0.3, 2.0])
def test_ipo_stops_at_the_probability_less_one_half(gap):
    p = 1 / (1 + math.exp(-gap))
    assert optimum(lambda d: of_logit(d, link="ipo"), gap) == pytest.approx(p - 0.5, abs=1e-6)


def test_label_smoothing_shrinks_the_optimum_to_the_assumed_certainty():
    best = minimize_scalar(lambda d: of_logit(d, label_smoothing=0.1), bounds=(-9, 9), method="bounded").x
    assert best == pytest.approx(math.log(0.9 / 0.1), abs=1e-4)


# Winner-preserving scaling.


def residuals(seed):
    return randn(5, 4, 3, 3, seed=seed)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.9, 1.0])
def test_what_is_left_to_the_winner_is_its_share(kept):
    chosen, rejected = residuals(0), residuals(0) * 0.7 + 0.5 * residuals(1)
    rejected[0] = -chosen[0]  # pushing this one away helps the winner
    scale = winner_preserving_scale(chosen, rejected, kept_share=kept)
    own, shared = (chosen**2).sum((1, 2, 3)), (chosen * rejected).sum((1, 2, 3))
    assert (-own + scale * shared <= -kept * own + 1e-9).all()
    assert scale[0] == 1
    assert ((scale >= 0) & (scale <= 1)).all()
    limited = scale < 1
    torch.testing.assert_close((scale * shared)[limited], ((1 - kept) * own)[limited])


def test_only_the_gradient_of_the_rejected_error_is_scaled():
    errors = [error.requires_grad_() for error in four_errors(dtype=torch.float32)]
    scale = torch.linspace(0, 1, 8)
    plain, scaled = (
        preference_loss(*errors, beta=BETA),
        preference_loss(*errors, beta=BETA, rejected_gradient_scale=scale),
    )
    assert torch.equal(plain.sample_losses, scaled.sample_losses)
    ours, theirs = (torch.autograd.grad(out.loss, errors[:2]) for out in (scaled, plain))
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], scale * theirs[1])
    assert torch.equal(with_gradient_scaled(errors[1], scale), errors[1])


# Context and dimensions.


def test_the_scale_of_a_context_has_mean_one_and_falls_with_the_dispersion():
    dispersion = torch.tensor([0.1, 0.4, 0.2, 0.4], dtype=torch.float64)
    scale = mallows_scale(dispersion)
    assert scale.mean().item() == pytest.approx(1)
    assert scale[0] > scale[2] > scale[1] == scale[3] > 0
    assert (scale[0] / scale[1]).item() == pytest.approx(math.log(8) / math.log(2))
    assert torch.equal(mallows_scale(5 * dispersion), scale)
    assert torch.equal(mallows_scale(torch.zeros(3)), torch.ones(3))


def test_a_prompt_without_dispersion_counts_a_limited_number_of_times():
    scale = mallows_scale(torch.tensor([0.0, 1e-9, 1.0], dtype=torch.float64))
    assert scale[0] == scale[1]
    assert (scale[0] / scale[2]).item() == pytest.approx(math.log(100) / math.log(2))


def test_a_negative_dispersion_is_refused():
    with pytest.raises(ValueError, match="a dispersion is negative or not finite"):
        mallows_scale(torch.tensor([0.1, -0.1]))


def test_a_sum_is_the_mean_times_the_dimensions_and_a_full_weight_changes_no_bit():
    pred, target = (randn(3, 4, 8, 8, seed=seed).float() for seed in (0, 1))
    mean = squared_error(pred, target)
    torch.testing.assert_close(squared_error(pred, target, reduction="sum"), 256 * mean)
    assert torch.equal(squared_error(pred, target, torch.ones(3, 1, 8, 8)), mean)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference_weight": 1.2}, "reference_weight is 1.2, but it must be between 0"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5; expected 0 up to but without 0.5"),
        ({"beta": math.nan}, "beta is nan, but it must be > 0"),
    ],
)
def test_numbers_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        preference_loss(*four_errors(), **{"beta": 1.0} | changes)


def test_a_missing_reference_is_refused():
    with pytest.raises(ValueError, match=r"reference_weight is 1\.0, but the reference's errors are missing"):
        preference_loss(*four_errors()[:2], beta=1.0)


def test_smoothing_of_nothing_is_the_link_to_the_bit():
    z = randn(9, seed=3).float()
    assert torch.equal(smoothed_link(z, link="cauchy", label_smoothing=0.0), LINKS["cauchy"](z))
