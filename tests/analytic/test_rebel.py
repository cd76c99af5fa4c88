"""REBEL against the closed form of its regression: p ∝ p_old exp(A/η) on what is compared.

Where a policy can be anything, the squares of all pairs can be 0 together: then Δ_i - Δ_j = (A_i - A_j) / η, whatever
the pairs weigh. Policies here are tables, and everything that can happen is in one group.
"""

import itertools

import pytest
import torch

from rpo.objectives.endpoint.rebel import Rebel, left_to_gain
from rpo.objectives.endpoint.update import Moments, descend
from rpo.objectives.policy_gradient import plain
from rpo.process.categorical import MASK
from rpo.process.diffusion import diffusion_of
from rpo.types import Node

pytestmark = pytest.mark.analytic

ETA = 0.7


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def settled(parameter, loss, *, rate, steps=300):
    """Gradient descent with momentum on a loss that is made anew each time, and whose value means nothing."""
    speed = torch.zeros_like(parameter)
    for _ in range(steps):
        (slope,) = torch.autograd.grad(loss(), parameter)
        with torch.no_grad():
            speed.mul_(0.8).add_(slope)
            parameter -= rate * speed
    return parameter.detach()


def test_of_two_steps_the_paths_come_to_be_tilted_by_their_advantage():
    """Three choices in the first step, three in the second that depend on the first: nine paths."""
    old = normal(4, 3)  # a row for the start, and one after each first choice
    first, second = torch.tensor(list(itertools.product(range(3), repeat=2))).T
    advantage, group = normal(9, seed=1), torch.zeros(9, dtype=torch.long)
    table = old.clone().requires_grad_()

    def steps(logits):
        said = logits.log_softmax(dim=1)
        return torch.stack([said[0, first], said[1 + first, second]], dim=1)

    def loss():
        now, before = steps(table), steps(old)
        change = (now - before).sum(dim=1).detach()
        worth = 2 * ETA * left_to_gain(advantage, change, group, eta=ETA)
        every = worth[:, None].expand(-1, 2).flatten()
        return plain(now.flatten(), before.flatten(), every, num_dims=1).loss.view(9, 2).sum(dim=1).mean()

    found = steps(settled(table, loss, rate=1.0)).sum(dim=1)
    tilted = (steps(old).sum(dim=1) + advantage / ETA).log_softmax(dim=0)
    assert torch.allclose(found, tilted, atol=1e-6)
    assert (tilted - steps(old).sum(dim=1)).abs().max() > 0.5


def test_the_slope_is_that_of_the_squares_of_all_pairs():
    change, advantage = normal(6).requires_grad_(), normal(6, seed=1)
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    worth = left_to_gain(advantage, change.detach(), group, eta=ETA)
    (found,) = torch.autograd.grad((-2 * ETA * worth * change).mean(), change)
    gap = ETA * (change[:, None] - change) - (advantage[:, None] - advantage)
    pairs = (0.5 * gap**2 * (group[:, None] == group)).sum(dim=1) / 2  # K - 1 others
    (expected,) = torch.autograd.grad(pairs.mean(), change)
    assert torch.allclose(found, expected)


def endpoint_loss(prediction, old, advantage, *, target, x_t, node, kind):
    """REBEL's surrogate at one moment that a whole group shares, with what is said of it now."""
    diffusion, preset = diffusion_of(kind), Rebel(eta=ETA)
    said = {"old": old, "current": prediction.detach()}
    errors = {name: diffusion.error(one, target, x_t) for name, one in said.items()}
    worth = preset.worth(advantage, errors, torch.zeros(len(target), dtype=torch.long))
    moments = Moments(prediction, target, x_t, node, torch.ones(len(target)), worth, diffusion, said)
    return descend(moments, preset.terms(moments))[0].mean()


def test_tokens_come_to_be_tilted_by_their_advantage():
    """All grids of two places, from masks alone: E = (2/M) log p, so that p ∝ p_old exp(M A / 2η)."""
    codes, places = 3, 2
    grids = torch.tensor(list(itertools.product(range(codes), repeat=places)), dtype=torch.float64)
    gains = normal(places, codes, seed=1)
    advantage = sum(gains[place][grids[:, place].long()] for place in range(places))
    target = grids.view(-1, 1, 1, places)
    x_t = torch.full((len(grids), 3, 1, places), float(MASK), dtype=torch.float64)
    node = Node(*(torch.tensor(value, dtype=torch.float64) for value in (0.0, 1.0, 1000.0)))
    old = normal(1, codes, 1, places)
    table = old.clone().requires_grad_()

    def loss():
        every = table.expand(len(grids), -1, -1, -1)
        return endpoint_loss(every, old.expand_as(every), advantage, target=target, x_t=x_t, node=node, kind="logits")

    found = settled(table, loss, rate=1.0).log_softmax(dim=1)[0, :, 0]
    tilted = (old[0, :, 0] + places / (2 * ETA) * gains.T).log_softmax(dim=0)
    assert torch.allclose(found, tilted, atol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_of_latents_differences_of_likelihood_come_to_be_those_of_advantages(kind):
    count = 5
    x_t, target, advantage = normal(count, 1, 2, 2), normal(count, 1, 2, 2, seed=1), 0.3 * normal(count, seed=2)
    node = Node(*(torch.full((count, 1, 1, 1), value, dtype=torch.float64) for value in (0.8, 0.6, 0.6)))
    old = target + 2 * normal(count, 1, 2, 2, seed=3)
    table = old.clone().requires_grad_()
    where = {"target": target, "x_t": x_t, "node": node, "kind": kind}
    found = settled(table, lambda: endpoint_loss(table, old, advantage, **where), rate=0.3)
    error = lambda said: (said - target).square().mean(dim=(1, 2, 3))  # noqa: E731
    change = error(old) - error(found)
    assert torch.allclose(change - change.mean(), (advantage - advantage.mean()) / ETA, atol=1e-6)
