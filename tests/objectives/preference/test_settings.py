"""Objectives as their settings call them: each setting against its formula, and what the past of a run does."""

import dataclasses
from typing import get_args

import pytest
import torch

from rpo.objectives.preference import Objective
from rpo.objectives.preference.base import Comparison, PreferenceObjective
from rpo.objectives.preference.dpo import TIME_BINS, TIME_DECAY, Dpo
from rpo.objectives.preference.kto import KL_DECAY, Kto, kto_losses
from rpo.objectives.preference.mapo import Mapo, mapo
from rpo.objectives.preference.winner_preserving import winner_preserving_scale
from rpo.trainers.pairs.running_statistics import RunningStatistics
from rpo.training.processes import Processes

BETA, PAIRS = 8.0, 6
TIME = torch.tensor([0.0, 0.3, 0.5, 0.749, 0.75, 0.999])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compared(*, seed=0, time=TIME, **known):
    """Errors at noise of any kind, and residuals of places."""
    errors = [randn(len(time), seed=seed + side).abs() + 0.1 for side in range(4)]
    residuals = [randn(len(time), 4, 3, 3, seed=7), 0.6 * randn(len(time), 4, 3, 3, seed=7) + randn(1, seed=8)]
    return Comparison(
        errors[0].requires_grad_(),
        errors[1].requires_grad_(),
        (errors[2], errors[3]),
        time=time,
        beta=BETA,
        num_dims=256,
        residuals=lambda: (residuals[0], residuals[1]),
        **known,
    )


@pytest.mark.parametrize("kind", get_args(get_args(Objective)[0]))
def test_all_of_the_union_are_what_the_trainer_calls(kind):
    assert isinstance(kind(), PreferenceObjective)


PAIRED = compared()


def z(pairs=PAIRED, *, reference_weight=1.0):
    favour = pairs.rejected - pairs.chosen
    return 0.5 * (favour - reference_weight * (pairs.reference[1] - pairs.reference[0])).detach()


def argument(objective, pairs=PAIRED, statistics=None):
    """What the link is asked of, which `linear` gives back."""
    return -objective(pairs, statistics).sample_losses


def linear(**settings):
    return Dpo(link="linear", **settings)


def close(found, expected):
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_plain_dpo_is_the_formula_and_its_metrics_are_of_the_policy_s_favour():
    output = linear()(PAIRED, None)
    assert close(output.sample_losses, -BETA * z())
    assert output.metrics["dpo/margin"].item() == pytest.approx(BETA * z().mean().item(), rel=1e-4)
    assert output.metrics["dpo/implicit_accuracy"].item() == pytest.approx((z() > 0).float().mean().item())


def test_every_number_of_the_settings_counts():
    assert close(argument(linear(margin=0.7)), BETA * z() - 0.7)
    mixed = linear(margin=0.7, margin_mixed=True, reference_weight=0.25)
    assert close(argument(mixed), BETA * z(reference_weight=0.25) - 0.75 * 0.7)
    sft = 0.2 * 0.5 * BETA * (PAIRED.chosen - PAIRED.reference[0])
    assert close(argument(linear(sft_weight=0.2)), BETA * z() - sft)
    smoothed = Dpo(label_smoothing=0.1)(PAIRED, None).sample_losses
    sides = [torch.nn.functional.softplus(sign * BETA * z()) for sign in (-1, 1)]
    assert close(smoothed, 0.9 * sides[0] + 0.1 * sides[1])


def test_weights_are_of_equal_parts_of_the_times_however_many_there_are():
    found = argument(linear(normalization="weights", time_weights=(0.0, 3.0, 0.5, 2.0)))
    assert close(found, BETA * torch.tensor([0.0, 3.0, 0.5, 0.5, 2.0, 2.0]) * z())


def test_without_reference_errors_count_as_they_are():
    alone = dataclasses.replace(PAIRED, reference=None)
    assert close(argument(linear(reference_weight=0.0, margin=0.7), alone), BETA * z(reference_weight=0.0) - 0.7)


def test_margins_and_scales_are_those_of_the_pairs():
    score_gap, scale = torch.linspace(0.5, 2.5, PAIRS), torch.linspace(2.0, 0.4, PAIRS)
    margin = linear(margin_from="rewards", margin=0.7)
    assert close(argument(margin, compared(score_gap=score_gap)), BETA * z() - 0.7 * score_gap)
    assert close(argument(linear(context="scores"), compared(context_scale=scale)), scale * BETA * z())


def test_the_winner_keeps_its_share_by_the_gradient_of_the_loser():
    plain, kept = (
        torch.autograd.grad(objective(PAIRED, None).loss, (PAIRED.chosen, PAIRED.rejected))
        for objective in (Dpo(), Dpo(winner_preserving=0.9))
    )
    scale = winner_preserving_scale(*PAIRED.residuals(), kept_share=0.9)
    assert (scale < 1).any()
    assert torch.equal(kept[0], plain[0])
    assert close(kept[1], scale * plain[1])


# What depends on earlier updates.


def statistics_of(objective):
    return RunningStatistics(objective.bins, decay=objective.decay, device=torch.device("cpu"))


def gaps(pairs, *, of_reference):
    sides = pairs.reference if of_reference else (pairs.chosen.detach(), pairs.rejected.detach())
    return sides[0] - sides[1]


@pytest.mark.parametrize("reference_weight", [1.0, 0.0])
def test_a_normalised_time_is_divided_by_how_far_the_errors_of_a_pair_used_to_lie_apart(reference_weight):
    """Those of the reference, which does not move, where it is asked; of earlier updates, not of this one."""
    objective = linear(normalization="time", reference_weight=reference_weight)
    pairs = PAIRED if reference_weight else dataclasses.replace(PAIRED, reference=None)
    statistics, expected = statistics_of(objective), statistics_of(objective)
    now = BETA * z(reference_weight=reference_weight)
    for _ in range(2):  # nothing is known yet, nor within the update
        assert close(argument(objective, pairs, statistics), now)
    bins = (TIME * TIME_BINS).long()
    for _ in range(2):
        expected.observe(gaps(PAIRED, of_reference=reference_weight > 0), bins)
    for one in (statistics, expected):
        one.advance(Processes())
    usual = expected.relative_std()[bins]
    assert usual.max() > 1.01 * usual.min()
    assert close(argument(objective, pairs, statistics), now / usual)
    assert objective.decay == TIME_DECAY


def test_a_margin_by_time_is_wider_where_errors_lie_farther_apart():
    objective = linear(margin_from="time", margin=0.7)
    statistics = statistics_of(objective)
    objective(PAIRED, statistics)
    statistics.advance(Processes())
    usual = statistics.relative_std()[(TIME * TIME_BINS).long()]
    assert usual.max() > 1.01 * usual.min()
    assert close(argument(objective, PAIRED, statistics), BETA * z() - 0.7 * usual)


def test_kto_is_its_formula_on_each_side_by_the_running_mean_of_earlier_gains():
    objective, gains = Kto(desirable_weight=2.0, undesirable_weight=0.5), []
    statistics = statistics_of(objective)
    for seed in (10, 20):
        earlier = compared(seed=seed)
        objective(earlier, statistics)
        statistics.advance(Processes())
        gains.append((torch.cat(earlier.reference) - torch.cat(earlier.errors)).mean().item())
    baseline = (KL_DECAY * gains[0] + gains[1]) / (KL_DECAY + 1)
    output = objective(PAIRED, statistics)
    expected = kto_losses(
        torch.cat(PAIRED.errors),
        torch.cat(PAIRED.reference),
        torch.arange(2 * PAIRS) < PAIRS,
        beta=BETA,
        baseline=baseline,
        desirable_weight=2.0,
        undesirable_weight=0.5,
    )
    assert close(output.sample_losses, expected.view(2, -1).mean(dim=0))
    assert output.metrics["dpo/kl_baseline"].item() == pytest.approx(BETA * max(baseline, 0), rel=1e-4)
    assert output.metrics["dpo/margin"].item() == pytest.approx(2 * BETA * z().mean().item(), rel=1e-4)


def test_the_temperature_of_mapo_falls_with_the_root_of_the_dimensions():
    errors = PAIRED.errors
    expected = mapo(*errors, beta=BETA, slope=0.5, temperature=62.5)  # 1000 (256 / 65,536)^½
    assert torch.allclose(Mapo()(PAIRED, None).sample_losses, expected.sample_losses, rtol=1e-4)
    expected = mapo(*errors, beta=BETA, slope=0.2, temperature=3.0)
    assert torch.equal(Mapo(slope=0.2, temperature=3.0)(PAIRED, None).sample_losses, expected.sample_losses)


@pytest.mark.parametrize(
    ("objective", "beta"),
    [(Dpo(), 78.125), (Dpo(reduction="sum"), 78.125 / 256), (Kto(), 1000 / 64), (Mapo(), 0.1)],
)
def test_beta_is_the_paper_s_for_the_size_of_the_latents(objective, beta):
    assert objective.default_beta(256) == beta


# What is refused, each with one clear error.


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (Dpo, {"beta": 0.0}, "'beta' to 0.0"),
        (Dpo, {"beta": float("nan")}, "'beta' to nan"),
        (Dpo, {"sft_weight": -0.1}, "'sft_weight' to -0.1"),
        (Dpo, {"label_smoothing": 0.5}, "'label_smoothing' to 0.5"),
        (Dpo, {"normalization": "weights"}, "weights come with normalization: weights"),
        (Dpo, {"time_weights": (1.0,)}, "weights come with normalization: weights"),
        (Dpo, {"normalization": "weights", "time_weights": (0.0, 0.0)}, "one of them must be above 0"),
        (Dpo, {"normalization": "weights", "time_weights": (1.0, -1.0)}, r"'time_weights\[1\]' to -1.0"),
        (Dpo, {"margin": -0.1}, "'margin' to -0.1"),
        (Dpo, {"margin_from": "rewards", "margin": 0.0}, "margin_from is rewards and margin 0"),
        (Dpo, {"normalization": "time", "margin_from": "time"}, "one scale at every time already"),
        (Dpo, {"margin": 1.0, "margin_mixed": True}, "1 - reference_weight = 0 times"),
        (Dpo, {"reference_weight": 1.5}, "'reference_weight' to 1.5"),
        (Dpo, {"winner_preserving": 2.0}, "'winner_preserving' to 2.0"),
        (Mapo, {"slope": 0.0}, "'slope' to 0.0"),
        (Kto, {"undesirable_weight": -1.0}, "'undesirable_weight' to -1.0"),
    ],
)
def test_impossible_objectives_are_refused(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(**settings)
