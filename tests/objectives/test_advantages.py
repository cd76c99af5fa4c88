"""Advantages against their sums, and what must not change them."""

import math

import pytest
import torch

from rpo.objectives.advantages import (
    gae,
    group_normalize,
    normalize_per_step,
    return_minus_value,
    shares,
    traced_returns,
    value_difference,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


GROUP = torch.tensor([7, 3, 3, 7, -1, 3, -1, 7])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_sum_to_zero_in_each_group(scale):
    advantages = group_normalize(100 + randn(8), GROUP, scale=scale)
    for label in (7, 3, -1):
        assert advantages[label == GROUP].sum().item() == pytest.approx(0, abs=1e-9)
        assert advantages[label == GROUP].abs().max() > 0.01


def test_each_scale_is_its_formula():
    rewards = randn(8)
    deviation = torch.empty_like(rewards)
    expected = torch.empty_like(rewards)
    for label in (7, 3, -1):
        own = rewards[label == GROUP]
        deviation[label == GROUP] = own - own.mean()
        expected[label == GROUP] = (own - own.mean()) / (own.std(correction=0) + 0.5)
    assert torch.allclose(group_normalize(rewards, GROUP, scale="group", eps=0.5), expected)
    assert torch.allclose(group_normalize(rewards, GROUP, scale="none", eps=0.5), deviation)
    whole = rewards.std(correction=0)
    assert torch.allclose(group_normalize(rewards, GROUP, scale="batch", eps=0.5), deviation / (whole + 0.5))


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_unit_and_zero_of_the_reward_do_not_matter(scale):
    rewards = randn(8)
    advantages = group_normalize(rewards, GROUP, scale=scale, eps=0.0)
    assert torch.allclose(group_normalize(37 * rewards - 11, GROUP, scale=scale, eps=0.0), advantages, atol=1e-12)
    assert torch.allclose(group_normalize(-rewards, GROUP, scale=scale, eps=0.0), -advantages, atol=1e-12)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_what_could_not_be_judged_is_in_no_mean_and_no_spread_and_gets_0(scale):
    """Groups with 1 and 3 left, with 6 and 2, with one image, and with none."""
    nan = math.nan
    rewards = torch.tensor([1.0, nan, 3.0, 6.0, 2.0, nan, nan, 4.0, nan, nan], dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3, 3])
    of_all = torch.tensor([1.0, 3.0, 6.0, 2.0, 4.0], dtype=torch.float64).std(correction=0).item()
    first, second = {"group": (1, 2), "batch": (of_all, of_all), "none": (1, 1)}[scale]
    found = group_normalize(rewards, group, scale=scale, eps=1e-12)
    assert found.tolist() == pytest.approx([-1 / first, 0, 1 / first, 2 / second, -2 / second, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("scale", ["group", "none"])
def test_one_group_does_not_feel_another(scale):
    rewards, others = randn(8), randn(8, seed=1)
    mixed = torch.where(GROUP == 3, rewards, 50 * others)
    advantages = group_normalize(mixed, GROUP, scale=scale)
    assert torch.equal(advantages[GROUP == 3], group_normalize(rewards, GROUP, scale=scale)[GROUP == 3])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_give_exactly_zero(scale):
    # Three times 0.1 in float32 has a mean that is not 0.1, and a spread of 0 to divide by.
    rewards = torch.tensor([0.1, 0.1, 0.1, 3.0, 4.0])
    advantages = group_normalize(rewards, torch.tensor([0, 0, 0, 1, 1]), scale=scale)
    assert advantages[:3].tolist() == [0, 0, 0]
    assert advantages[3] == -advantages[4] != 0
    assert group_normalize(rewards[:3], torch.zeros(3, dtype=torch.int64), scale=scale, eps=1e-8).tolist() == [0, 0, 0]


def test_a_large_offset_costs_no_digits_in_float32():
    rewards = torch.tensor([0.0, 0.25, 0.5, 1.0])
    group = torch.zeros(4, dtype=torch.int64)
    assert torch.equal(
        group_normalize(rewards + 2.0**20, group, scale="group"), group_normalize(rewards, group, scale="group")
    )


def test_half_precision_rewards_are_widened():
    advantages = group_normalize(
        torch.tensor([1, 2048], dtype=torch.float16), torch.zeros(2, dtype=torch.int64), scale="none"
    )
    assert advantages.dtype == torch.float32
    assert advantages.tolist() == [-1023.5, 1023.5]


def test_a_group_of_one_is_refused():
    with pytest.raises(
        ValueError, match="1 of 3 images are alone in their group, .*; draw at least 2 images per prompt"
    ):
        group_normalize(randn(3), torch.tensor([0, 0, 1]), scale="group")


def path(steps=6, batch=5):
    return randn(steps + 1, batch), randn(steps, batch, seed=1).abs()


def test_value_difference_telescopes_to_the_reward_less_costs_less_the_first_value():
    values, costs = path()
    advantages = value_difference(values, costs)
    assert torch.allclose(advantages[2], values[3] - values[2] - costs[2])
    assert torch.allclose(advantages.sum(0), values[-1] - costs.sum(0) - values[0])


def test_return_minus_value_counts_the_costs_to_come():
    values, costs = path()
    for k in range(6):
        expected = values[6] - costs[k:].sum(0) - values[k]
        assert torch.allclose(return_minus_value(values, costs)[k], expected)


def test_gae_runs_from_value_difference_to_return_minus_value():
    values, costs = path()
    assert torch.equal(gae(values, costs, trace=0.0), value_difference(values, costs))
    assert torch.allclose(gae(values, costs, trace=1.0), return_minus_value(values, costs), rtol=0, atol=1e-14)


def test_gae_is_the_sum_of_traced_differences():
    values, costs = path()
    delta = value_difference(values, costs)
    for k in range(6):
        expected = sum(0.7 ** (j - k) * delta[j] for j in range(k, 6))
        assert torch.allclose(gae(values, costs, trace=0.7)[k], expected)


def test_the_noise_of_value_difference_vanishes_with_the_step_and_that_of_the_return_does_not():
    """A Brownian path with its exact value V(t, x) = x: the two estimators of one and the same mean 0."""
    variances = {}
    for steps in (10, 40):
        increments = randn(steps, 4000, seed=2) / steps**0.5
        values = torch.cat([torch.zeros(1, 4000, dtype=torch.float64), increments.cumsum(0)])
        costs = torch.zeros(steps, 4000, dtype=torch.float64)
        variances[steps] = [gae(values, costs, trace=trace)[0].var().item() for trace in (0.0, 1.0)]
    assert variances[10][0] / variances[40][0] == pytest.approx(4, rel=0.1)
    assert variances[10][1] == pytest.approx(1, rel=0.1)
    assert variances[40][1] == pytest.approx(1, rel=0.1)


def test_traced_returns_of_a_martingale_s_exact_values_are_those_values():
    values = torch.linspace(3, 0, 7, dtype=torch.float64)[:, None].expand(7, 2)
    costs = torch.full((6, 2), -0.5, dtype=torch.float64)
    for trace in (0.0, 0.3, 1.0):
        assert torch.allclose(traced_returns(values, costs, trace=trace), values[:-1])


def test_normalize_per_step_centres_and_scales_each_step_by_itself():
    advantages = randn(3, 50) * torch.tensor([[1.0], [100.0], [0.01]]) + 5
    normal = normalize_per_step(advantages, eps=0.0)
    assert torch.allclose(normal.mean(1), torch.zeros(3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(normal.std(1, correction=0), torch.ones(3, dtype=torch.float64))
    assert normalize_per_step(torch.full((2, 3), 0.1)).tolist() == [[0, 0, 0]] * 2


@pytest.mark.parametrize("advantage", [value_difference, return_minus_value])
def test_one_value_per_node_and_one_cost_per_step(advantage):
    with pytest.raises(ValueError, match=r"5 values come with 1 costs, but n \+ 1 nodes have n steps; give the"):
        advantage(randn(5, 2), randn(1, 2))


@pytest.mark.parametrize("trace", [-0.1, 1.1])
def test_trace_is_a_share(trace):
    with pytest.raises(ValueError, match=rf"trace is {trace}, but it must be in \[0, 1\]; 0.95 is usual"):
        gae(*path(), trace=trace)


def test_shares_sum_to_one_and_are_those_of_the_squares_where_parts_are_unrelated():
    first, second = torch.tensor([3.0, 3.0, -3.0, -3.0]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert shares(torch.stack([first, second])).tolist() == pytest.approx([0.9, 0.1])
    assert shares(torch.stack([2 * first, -first])).tolist() == pytest.approx([2, -1])
    parts = torch.randn(3, 64)
    assert shares(parts).sum().item() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(shares(parts), shares(7 * parts), atol=1e-5)


def test_no_one_has_a_share_in_nothing():
    assert shares(torch.zeros(2, 5)).tolist() == [0, 0]
    assert shares(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])).tolist() == [0, 0]


def test_where_nobody_is_judged_nobody_stands_out():
    nothing = torch.full((4,), math.nan)
    for scale in ("group", "batch", "none"):
        assert group_normalize(nothing, torch.tensor([0, 0, 1, 1]), scale=scale).tolist() == [0, 0, 0, 0]
