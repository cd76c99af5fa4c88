"""Diffusion-DPO against its closed form on shifted Gaussians, and the invariants of its loss.

Data N(m, S) and policies that are pure shifts N(m + delta, S) of the reference. Then, whatever the shared noise,

    inside = kappa delta (x_w - x_l),    kappa = beta sigma² alpha² / Sigma²  (Sigma = alpha² S + sigma²; epsilon)
                                         kappa = beta sigma² / Sigma²         (flow, alpha = 1 - sigma)

and with Bradley-Terry labels of the reward a x, the best policy at a single time has delta = a / kappa.
"""

import math

import pytest
import torch
from scipy.optimize import minimize_scalar

from rpo.objectives.preference.base import beta_for_dims
from rpo.objectives.preference.dpo import preference_loss
from rpo.process.prediction import add_noise, from_x0_eps, squared_error
from rpo.types import Node

M, S = 0.3, 0.7


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def node_at(prediction_type, level):
    sigma = torch.tensor(level, dtype=torch.float64)
    alpha = 1 - sigma if prediction_type == "flow" else (1 - sigma**2).sqrt()
    return Node(alpha, sigma, sigma)


def shift_policy(x_t, node, delta, prediction_type):
    """The exact network output for data N(m + delta, S)."""
    mean = M + delta
    variance = node.alpha**2 * S + node.sigma**2
    x0_hat = mean + node.alpha * S / variance * (x_t - node.alpha * mean)
    return from_x0_eps(x0_hat, (x_t - node.alpha * x0_hat) / node.sigma, node, prediction_type)


def kappa(prediction_type, node, beta):
    variance = node.alpha**2 * S + node.sigma**2
    alpha = 1.0 if prediction_type == "flow" else node.alpha
    return beta * node.sigma**2 * alpha**2 / variance**2


def errors(x_0, eps, node, delta, prediction_type):
    x_t, target = add_noise(x_0, eps, node), from_x0_eps(x_0, eps, node, prediction_type)
    return squared_error(shift_policy(x_t, node, delta, prediction_type), target)


def dpo_on_shift(chosen, rejected, eps, node, delta, prediction_type, *, beta):
    return preference_loss(
        errors(chosen, eps, node, delta, prediction_type),
        errors(rejected, eps, node, delta, prediction_type),
        errors(chosen, eps, node, 0.0, prediction_type),
        errors(rejected, eps, node, 0.0, prediction_type),
        beta=beta,
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow"])
@pytest.mark.parametrize("level", [0.2, 0.6, 0.9])
def test_logit_is_kappa_delta_gap_for_every_noise(prediction_type, level):
    node, beta, delta = node_at(prediction_type, level), 3.0, 0.4
    chosen, rejected = randn(64, 1, 1, 1, seed=0), randn(64, 1, 1, 1, seed=1)
    out = dpo_on_shift(chosen, rejected, randn(64, 1, 1, 1, seed=2), node, delta, prediction_type, beta=beta)
    inside = kappa(prediction_type, node, beta) * delta * (chosen - rejected).flatten()
    assert torch.allclose(out.sample_losses, torch.nn.functional.softplus(-inside), atol=1e-9)
    assert out.metrics["dpo/margin"].item() == pytest.approx(inside.mean().item(), abs=1e-9)
    assert out.metrics["dpo/implicit_accuracy"].item() == pytest.approx((inside > 0).double().mean().item())


def population_loss(delta, nodes, prediction_type, beta, slope):
    """Exact expectation over Bradley-Terry labels: both orders of each pair, weighted by their probability."""
    first, second = (M + math.sqrt(S) * randn(4000, 1, 1, 1, seed=seed) for seed in (3, 4))
    eps = randn(4000, 1, 1, 1, seed=5)
    probability = torch.sigmoid(slope * (first - second)).flatten()
    total = 0.0
    for node in nodes:
        forward = dpo_on_shift(first, second, eps, node, delta, prediction_type, beta=beta).sample_losses
        backward = dpo_on_shift(second, first, eps, node, delta, prediction_type, beta=beta).sample_losses
        total += (probability * forward + (1 - probability) * backward).mean().item()
    return total


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow"])
def test_optimum_at_one_time_is_a_over_kappa(prediction_type):
    node, beta, slope = node_at(prediction_type, 0.6), 3.0, 0.9
    best = minimize_scalar(
        population_loss, args=([node], prediction_type, beta, slope), bounds=(-5, 5), method="bounded"
    ).x
    assert best == pytest.approx(slope / kappa(prediction_type, node, beta).item(), rel=1e-3)


def test_optimum_over_many_times_lies_between_those_of_single_times():
    nodes = [node_at("epsilon", level) for level in (0.2, 0.5, 0.8)]
    best = minimize_scalar(population_loss, args=(nodes, "epsilon", 3.0, 0.9), bounds=(-9, 9), method="bounded").x
    single = [0.9 / kappa("epsilon", node, 3.0).item() for node in nodes]
    assert min(single) < best < max(single)


def four_errors(batch=8):
    return [randn(batch, seed=seed).abs() + 0.1 for seed in range(4)]


def test_policy_equal_to_reference_gives_log_two():
    chosen, rejected, _, _ = four_errors()
    assert preference_loss(chosen, rejected, chosen, rejected, beta=5000.0).loss.item() == pytest.approx(math.log(2))


def test_swapping_the_sides_flips_the_margin():
    chosen, rejected, reference_chosen, reference_rejected = four_errors()
    out = preference_loss(chosen, rejected, reference_chosen, reference_rejected, beta=2.0)
    swapped = preference_loss(rejected, chosen, reference_rejected, reference_chosen, beta=2.0)
    assert out.metrics["dpo/margin"].item() == pytest.approx(-swapped.metrics["dpo/margin"].item())
    # softplus(-m) - softplus(m) = -m, sample by sample.
    margin = out.metrics["dpo/margin"].item()
    assert (out.sample_losses - swapped.sample_losses).mean().item() == pytest.approx(-margin)


def test_gradient_pushes_the_chosen_error_down_and_the_rejected_up_and_spares_the_reference():
    sides = [error.requires_grad_() for error in four_errors()]
    preference_loss(*sides, beta=2.0).loss.backward()
    assert (sides[0].grad > 0).all()
    assert (sides[1].grad < 0).all()
    # At equal gaps the weight of every sample is beta/4: the derivative of softplus at 0 times beta/2.
    chosen, rejected = (error.detach().requires_grad_() for error in sides[:2])
    preference_loss(chosen, rejected, chosen.detach(), rejected.detach(), beta=2.0).loss.backward()
    assert chosen.grad.tolist() == pytest.approx([2.0 / 4 / 8] * 8)


def test_sft_weight_adds_the_chosen_side_s_gradient_alone():
    chosen, rejected, reference_chosen, reference_rejected = four_errors()
    gradients = []
    for weight in (0.0, 0.5):
        sides = [chosen.clone().requires_grad_(), rejected.clone().requires_grad_()]
        preference_loss(*sides, reference_chosen, reference_rejected, beta=2.0, sft_weight=weight).loss.backward()
        gradients.append([side.grad for side in sides])
    assert (gradients[1][0] - gradients[0][0]).tolist() == pytest.approx([0.5 * 2.0 / 2 / 8] * 8)
    assert torch.equal(gradients[1][1], gradients[0][1])


def test_squared_error_is_a_mean_over_dimensions_in_float32():
    error = squared_error(torch.full((2, 4, 8, 8), 300.0, dtype=torch.float16), torch.zeros(2, 4, 8, 8))
    assert error.tolist() == [90_000.0, 90_000.0]  # float16 ends at 65,504


def test_beta_scales_with_the_latent_size():
    assert beta_for_dims(4 * 64 * 64) == 5000
    assert beta_for_dims(4 * 8 * 8) == 78.125


@pytest.mark.parametrize("beta", [0.0, -1.0])
def test_beta_must_be_positive(beta):
    with pytest.raises(ValueError, match=rf"beta is {beta}, but it must be > 0; 5000 is usual for SD 1.5"):
        preference_loss(*four_errors(), beta=beta)


def test_sft_weight_must_not_be_negative():
    with pytest.raises(ValueError, match="sft_weight is -1.0, but it must be >= 0"):
        preference_loss(*four_errors(), beta=1.0, sft_weight=-1.0)


def test_metrics_are_of_the_means_of_a_batch_and_nothing_is_accurate_at_the_start():
    """Ratios of means and not means of ratios, in which a pair at an easy time would count as much as all others."""
    chosen, rejected = torch.tensor([1.0, 9.0]), torch.tensor([2.0, 4.0])
    reference = torch.tensor([2.0, 3.0]), torch.tensor([1.0, 7.0])
    found = preference_loss(chosen, rejected, *reference, beta=2.0).metrics
    metrics = {name: value.item() for name, value in found.items()}
    assert metrics["dpo/chosen_error_ratio"] == pytest.approx(10 / 5)
    assert metrics["dpo/rejected_error_ratio"] == pytest.approx(6 / 8)
    assert metrics["dpo/reference_chosen_error"] == pytest.approx(2.5)
    assert metrics["dpo/margin"] == pytest.approx(-((-1 + 6) - (1 - 3)) / 2)
    assert metrics["dpo/implicit_accuracy"] == 0.5
    assert preference_loss(*reference, *reference, beta=2.0).metrics["dpo/implicit_accuracy"] == 0


def test_a_pair_above_the_cap_has_no_gradient_and_the_others_have_their_own():
    chosen, rejected, *reference = four_errors()
    favour = -0.5 * ((chosen - reference[0]) - (rejected - reference[1]))
    cap = favour.detach().median().item()
    free, capped = (chosen.detach().requires_grad_() for _ in range(2))
    preference_loss(free, rejected, *reference, beta=1.0).loss.backward()
    output = preference_loss(capped, rejected, *reference, beta=1.0, margin_cap=cap)
    output.loss.backward()
    is_capped = favour > cap
    assert 0 < is_capped.sum() < len(is_capped)
    assert torch.equal(capped.grad, torch.where(is_capped, 0.0, free.grad))
    assert output.metrics["dpo/capped"] == is_capped.float().mean()
