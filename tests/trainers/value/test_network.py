"""F of the value: what it knows before it has learnt, and how little it needs to correct a reward."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from rpo.trainers.value.estimator import ValueEstimator
from rpo.trainers.value.inputs import ValuePoints, skip_weights
from rpo.trainers.value.network import ValueNetwork, _places, _waves

SHAPE, TOKENS, DIM = (4, 8, 8), 5, 12


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def points_at(time, *, shape=SHAPE, seed=0):
    latents = [randn(len(time), *shape, seed=seed + part) for part in range(2)]
    return ValuePoints(*latents, time, randn(len(time), TOKENS, DIM, seed=seed + 2), ("a prompt",) * len(time))


def test_numbers_alone_see_no_latents_and_no_prompt_but_time_reward_and_baseline():
    network = ValueNetwork(SHAPE, DIM, sees_latents=False, channels=16)
    nn.init.normal_(network.numbers[-1].weight, generator=torch.Generator().manual_seed(1))
    time, reward, baseline = torch.linspace(0.1, 0.7, 6), randn(6), randn(6, seed=1)
    first, second = (replace(points_at(time, seed=seed), x0_reward=reward, baseline=baseline) for seed in (0, 7))
    assert torch.equal(network(first), network(second))
    for change in ({"x0_reward": -reward}, {"baseline": -baseline}, {"time": time + 0.2}):
        assert (network(replace(first, **change)) - network(first)).abs().min() > 1e-4


def test_a_time_is_told_in_waves_and_a_cell_by_its_row_and_column():
    time = torch.tensor([0.0, 0.3, 1.0])
    angles = torch.pi * time[:, None] * torch.tensor([1, 2, 4, 8, 16, 32])
    assert torch.allclose(_waves(time), torch.cat([time[:, None], angles.sin(), angles.cos()], dim=1))
    rows, columns = _places(torch.zeros(2, 4, 3, 5))[1]
    assert torch.equal(rows, torch.tensor([-1.0, 0.0, 1.0])[:, None].expand(3, 5))
    assert torch.equal(columns, torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]).expand(3, 5))


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 8, 8), (4, 9, 6)])
def test_network_starts_at_zero_and_sees_latents_and_prompt_of_any_size(shape):
    network = ValueNetwork(shape, DIM, channels=16)
    points = points_at(torch.rand(7), shape=shape)
    assert network(points).tolist() == [0] * 7
    nn.init.normal_(network.latents.head.weight, generator=torch.Generator().manual_seed(1))
    points.x_t.requires_grad_()
    points.x0_hat.requires_grad_()
    points.tokens.requires_grad_()
    network(points).sum().backward()
    for seen in (points.x_t, points.x0_hat, points.tokens):
        assert (seen.grad != 0).any()


def test_network_has_stable_diffusion_s_size_in_half_precision_embeddings():
    network = ValueNetwork((4, 64, 64), 768, channels=16)
    points = ValuePoints(randn(2, 4, 64, 64), randn(2, 4, 64, 64), torch.rand(2), randn(2, 77, 768).half(), ("a", "b"))
    assert network(points).shape == (2,)


def test_network_tells_the_order_of_tokens_that_know_their_place_apart():
    """As CLIP's do; the same words in another order must be able to mean another value."""
    network = ValueNetwork(SHAPE, DIM, channels=16)
    nn.init.normal_(network.latents.head.weight, generator=torch.Generator().manual_seed(1))
    points = points_at(torch.full((1,), 0.5))
    words, places = randn(1, TOKENS, DIM, seed=5), randn(1, TOKENS, DIM, seed=6)
    forth, back = (replace(points, tokens=order + places) for order in (words, words.flip(1)))
    assert (network(forth) - network(back)).abs().item() > 1e-3


def test_same_seed_same_network_and_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    first, again, other = (ValueNetwork(SHAPE, DIM, channels=16, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.latents.stem.weight, again.latents.stem.weight)
    assert not torch.equal(first.latents.stem.weight, other.latents.stem.weight)


@pytest.mark.parametrize("has_reward", [True, False])
def test_before_it_has_learnt_the_value_falls_back_on_what_the_group_earned(has_reward):
    """V = c_skip r(x0_hat) + (1 - c_skip) m while F is 0; m alone without a reward."""
    points = replace(points_at(torch.tensor([0.0, 0.5, 1.0])), baseline=torch.tensor([7.0, 8.0, 9.0]))
    terminal = (lambda x_0, prompts: torch.full((len(x_0),), 2.0)) if has_reward else None
    values = ValueEstimator(ValueNetwork(SHAPE, DIM, channels=16), terminal=terminal)(points)
    skip = skip_weights(points.time)[0] * has_reward
    assert torch.allclose(values, 2 * skip + (1 - skip) * points.baseline)
    assert values[2].item() == pytest.approx(9)


def misled(x_0, prompts):
    return 30 * x_0.mean((1, 2, 3)) + 5


def test_a_few_hundred_points_correct_a_reward_that_is_off_by_a_factor_and_an_offset():
    points = points_at(torch.full((256,), 0.5))
    truth = 10 * points.x0_hat.mean((1, 2, 3))
    network = ValueNetwork(SHAPE, DIM, sees_latents=False)
    value = ValueEstimator(network, reward_until=1.0, terminal=misled, learning_rate=1e-2)
    before = value.fit(points, truth, steps=300, batch_size=64)
    after = value.fit(points, truth, steps=0, batch_size=64)
    assert before["value/loss"] > 10
    assert after["value/loss"] < 0.01
