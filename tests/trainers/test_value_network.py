"""F of the value: what it knows before it has learnt, and how little it needs to correct a reward."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from rpo.trainers.value.estimator import Critic
from rpo.trainers.value.inputs import ValuePoints, skip_weights
from rpo.trainers.value.network import ValueNetwork, _places, _waves

SHAPE, TOKENS, DIM = (4, 8, 8), 5, 12


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def points_at(time, *, seed=0):
    latents = [randn(len(time), *SHAPE, seed=seed + part) for part in range(2)]
    return ValuePoints(*latents, time, randn(len(time), TOKENS, DIM, seed=seed + 2), ("a prompt",) * len(time))


def test_numbers_alone_see_no_latents_and_no_prompt_but_time_reward_and_baseline():
    network = ValueNetwork(SHAPE, DIM, inputs="reward", channels=16)
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


@pytest.mark.parametrize("design", ["cos_sin", "cos", "linear", "none"])
def test_before_it_has_learnt_the_value_falls_back_on_what_the_group_earned(design):
    """V = c_skip r(x0_hat) + (1 - c_skip) m while F is 0."""
    points = replace(points_at(torch.tensor([0.0, 0.5, 1.0])), baseline=torch.tensor([7.0, 8.0, 9.0]))
    terminal = None if design == "none" else lambda x_0, prompts: torch.full((len(x_0),), 2.0)
    values = Critic(ValueNetwork(SHAPE, DIM, channels=16), design=design, terminal=terminal)(points)
    skip, _ = skip_weights(design, points.time)
    assert torch.allclose(values, 2 * skip + (1 - skip) * points.baseline)
    assert values[2].item() == pytest.approx(9)


def misled(x_0, prompts):
    return 30 * x_0.mean((1, 2, 3)) + 5


def test_a_few_hundred_points_correct_a_reward_that_is_off_by_a_factor_and_an_offset():
    points = points_at(torch.full((256,), 0.5))
    truth = 10 * points.x0_hat.mean((1, 2, 3))
    network = ValueNetwork(SHAPE, DIM, inputs="reward")
    critic = Critic(network, design="cos_sin", terminal=misled, learning_rate=1e-2)
    before = critic.fit(points, truth, steps=300, batch_size=64)
    after = critic.fit(points, truth, steps=0, batch_size=64)
    assert before["value/loss"] > 10
    assert after["value/loss"] < 0.01
