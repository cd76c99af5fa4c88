"""What each term of an objective is made of, for a network that multiplies by a number: every error is written out."""

import math
from contextlib import contextmanager

import pytest
import torch
from rpo.objectives.mapo import mapo
from rpo.trainers.pairs.loss import PairFacts, PreferenceLoss
from rpo.trainers.preference_config import PreferenceConfig
from torch import nn

from rpo.trainers.pairs.batches import PairBatch
from rpo.trainers.pairs.running_statistics import RunningMoments
from rpo.training.processes import Processes
from rpo.types import Conditioning, Node

BETA, TIMES = 8.0, 1000


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Scaling:
    """A model that predicts x_t times a number, on a cosine schedule."""

    prediction_type = "epsilon"
    num_train_timesteps = TIMES

    def __init__(self):
        self.factor = nn.Parameter(torch.tensor(0.5))

    def node(self, timestep):
        angle = 0.5 * math.pi * (timestep[:, None, None, None] + 1) / (TIMES + 1)
        return Node(angle.cos(), angle.sin(), timestep[:, None, None, None])

    def predict(self, x_t, timestep, cond, guidance_scale=1.0):
        return self.factor * x_t


class ScalingPolicy:
    """Multiplies by 0.5, and its reference by 0.9."""

    def __init__(self):
        self.model = Scaling()
        self.parameters = [self.model.factor]

    @contextmanager
    def reference(self):
        policy, self.model.factor = self.model.factor, torch.tensor(0.9)
        try:
            yield
        finally:
            self.model.factor = policy


def batch_of(timestep, *, seed=0):
    count = len(timestep)
    embeds, names = torch.zeros(count, 1, 1), ("",) * count
    x_0, eps = randn(2 * count, 4, 8, 8, seed=seed), randn(count, 4, 8, 8, seed=seed + 1)
    pairs = tuple(reversed(range(count)))
    return PairBatch(
        x_0, eps, torch.tensor(timestep), Conditioning({"tokens": embeds}, {"tokens": embeds}), names, names, pairs
    )


BATCH = batch_of([0, 300, 500, 749, 750, 999])


def gaps(factor, batch=BATCH):
    """Chosen minus rejected error of every pair."""
    node = Scaling().node(batch.timestep)
    x_t = [node.alpha * x_0 + node.sigma * batch.eps for x_0 in batch.x_0.chunk(2)]
    chosen, rejected = (((factor * side - batch.eps) ** 2).mean(dim=(1, 2, 3)) for side in x_t)
    return (chosen - rejected).double()


def z(batch=BATCH, *, reference_weight=1.0):
    return -0.5 * (gaps(0.5, batch) - reference_weight * gaps(0.9, batch))


def loss_of(facts=None, **objective):
    return PreferenceLoss(ScalingPolicy(), PreferenceConfig(**objective), beta=BETA, sft_weight=0.0, facts=facts)


def argument(loss, batch=BATCH):
    """What the link is asked of, which `linear` gives back."""
    return -loss(batch).sample_losses.double()


def close(found, expected):
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_plain_dpo_is_the_formula_and_its_metrics_are_of_the_policy_s_favour():
    output = loss_of(link="linear")(BATCH)
    assert close(output.sample_losses.double(), -BETA * z())
    assert output.metrics["dpo/margin"].item() == pytest.approx(BETA * z().mean().item(), rel=1e-4)
    assert output.metrics["dpo/implicit_accuracy"].item() == pytest.approx((z() > 0).double().mean().item())


def test_weights_are_of_equal_parts_of_the_times_however_many_there_are():
    found = argument(loss_of(link="linear", normalization="weights", time_weights=(0.0, 3.0, 0.5, 2.0)))
    assert close(found, BETA * torch.tensor([0.0, 3.0, 0.5, 0.5, 2.0, 2.0]) * z())


@pytest.mark.parametrize("reference_weight", [1.0, 0.0])
def test_a_normalised_time_is_divided_by_how_far_the_errors_of_a_pair_used_to_lie_apart(reference_weight):
    """Those of the reference, which does not move, where it is asked; of earlier updates, not of this one."""
    loss = loss_of(link="linear", normalization="time", time_bins=4, reference_weight=reference_weight)
    assert close(argument(loss), BETA * z(reference_weight=reference_weight))  # nothing is known yet
    assert close(argument(loss), BETA * z(reference_weight=reference_weight))  # nor within the update
    loss.advance(Processes())
    bins = torch.tensor([0, 1, 2, 2, 3, 3])
    moments = RunningMoments(4, decay=0.99, device=torch.device("cpu"))
    for _ in range(2):
        moments.observe(gaps(0.9 if reference_weight else 0.5), bins)
    moments.advance(Processes())
    usual = moments.relative_std()[bins].double()
    assert usual.max() > 1.01 * usual.min()
    assert close(argument(loss), BETA * z(reference_weight=reference_weight) / usual)
    moments.observe(gaps(0.9 if reference_weight else 0.5), bins)
    for _ in range(3):  # what was seen counts less and less
        other = batch_of([10, 260, 510, 760], seed=5)
        loss(other)
        moments.observe(gaps(0.9 if reference_weight else 0.5, other), torch.arange(4))
        for one in (loss, moments):
            one.advance(Processes())
    usual = moments.relative_std()[bins].double()
    assert close(argument(loss), BETA * z(reference_weight=reference_weight) / usual)


def test_a_margin_counts_on_the_scale_of_the_argument():
    assert close(argument(loss_of(link="linear", margin=0.7)), BETA * z() - 0.7)


def test_a_margin_by_time_is_wider_where_errors_lie_farther_apart():
    loss = loss_of(link="linear", margin_from="time", margin=0.7, time_bins=2)
    loss(BATCH)
    loss.advance(Processes())
    usual = loss.moments.relative_std().double()[[0, 0, 1, 1, 1, 1]]
    assert usual.max() > 1.01 * usual.min()
    assert close(argument(loss), BETA * z() - 0.7 * usual)


def test_margins_and_scales_are_those_of_the_pairs_in_the_batch():
    score_gaps, scale = torch.linspace(0.5, 2.5, 9), torch.linspace(2.0, 0.4, 9)
    own = torch.arange(5, -1, -1)
    margin = loss_of(PairFacts(score_gaps=score_gaps), link="linear", margin_from="rewards", margin=0.7)
    assert close(argument(margin), BETA * z() - 0.7 * score_gaps[own])
    context = loss_of(PairFacts(context_scale=scale), link="linear", context="scores")
    assert close(argument(context), scale[own] * BETA * z())


def test_the_temperature_of_mapo_falls_with_the_root_of_the_dimensions():
    output = loss_of(method="mapo")(BATCH)
    node = Scaling().node(BATCH.timestep)
    errors = [
        ((0.5 * (node.alpha * x_0 + node.sigma * BATCH.eps) - BATCH.eps) ** 2).mean(dim=(1, 2, 3))
        for x_0 in BATCH.x_0.chunk(2)
    ]
    expected = mapo(*errors, beta=BETA, slope=0.5, temperature=62.5)  # 1000 (256 / 65,536)^½
    assert torch.allclose(output.sample_losses, expected.sample_losses, rtol=1e-3)


def test_kto_favours_the_side_that_gained_more():
    metrics = loss_of(method="kto")(BATCH).metrics
    assert metrics["dpo/margin"].item() == pytest.approx(2 * BETA * z().mean().item(), rel=1e-4)
    assert metrics["dpo/implicit_accuracy"].item() == pytest.approx((z() > 0).double().mean().item())


def test_the_baseline_of_kto_is_a_running_mean_of_earlier_updates():
    loss, gains = loss_of(method="kto"), []
    for seed in (0, 10):
        batch = batch_of([100, 200, 300], seed=seed)
        loss(batch)
        loss.advance(Processes())
        node = Scaling().node(batch.timestep)
        x_t = torch.cat([node.alpha * x_0 + node.sigma * batch.eps for x_0 in batch.x_0.chunk(2)])
        eps = torch.cat([batch.eps, batch.eps])
        gains.append(((0.9 * x_t - eps) ** 2 - (0.5 * x_t - eps) ** 2).mean().item())
    assert 0 < gains[0] != pytest.approx(gains[1])
    expected = BETA * (0.9 * gains[0] + gains[1]) / 1.9
    assert loss(BATCH).metrics["dpo/kl_baseline"].item() == pytest.approx(expected, rel=1e-4)
