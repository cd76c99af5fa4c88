"""What the pages for those who come from elsewhere say of beta, clip and gradients, by the other codes' formulas."""

import pytest
import torch
import torch.nn.functional as F

from rpo.objectives.advantages import MAX_ADVANTAGE
from rpo.objectives.policy_gradient import clipped_surrogate
from rpo.objectives.preference.base import beta_for_dims
from rpo.objectives.preference.dpo import preference_loss
from rpo.process.transition import Gaussian
from rpo.trainers.rollouts.prompt_history import PromptHistory

DIMS = 4 * 64 * 64


def errors(count=6):
    """Mean squared errors of chosen, rejected and their references, near each other as in training."""
    generator = torch.Generator().manual_seed(0)
    found = 0.1 + 2e-4 * torch.rand(4, count, generator=generator, dtype=torch.float64)
    return [one.requires_grad_() for one in found]


def gap(four):
    chosen, rejected, reference_chosen, reference_rejected = four
    return (chosen - rejected) - (reference_chosen - reference_rejected)


def salesforce(four, beta):
    return -F.logsigmoid(-0.5 * beta * gap(four)).mean()


def diffusers_sd(four, beta):
    return -F.logsigmoid(beta * -gap(four)).mean()


def diffusers_hinge(four, beta):
    return torch.relu(1 - beta * -gap(four)).mean()


PREFERENCE = {
    "Salesforce, SDXL of diffusers": (salesforce, 5000, {"beta": 5000.0}),
    "SD of diffusers": (diffusers_sd, 2500, {"beta": 5000.0}),
    "SD of diffusers, hinge": (diffusers_hinge, 2500, {"beta": 5000.0, "link": "hinge"}),
}


@pytest.mark.parametrize("name", PREFERENCE)
def test_beta_converts_as_the_table_says(name):
    theirs, beta, ours = PREFERENCE[name]
    four = errors()
    expected, found = theirs(four, beta), preference_loss(*four, **ours).loss
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    for one, other in zip(torch.autograd.grad(found, four[:2]), torch.autograd.grad(expected, four[:2]), strict=True):
        torch.testing.assert_close(one, other)


def test_summed_errors_want_beta_per_dimension():
    four = errors()
    summed = [one.detach() * DIMS for one in four]
    by_mean, by_sum = preference_loss(*four, beta=5000.0).loss, preference_loss(*summed, beta=5000 / DIMS).loss
    assert by_sum.item() == pytest.approx(by_mean.item(), rel=1e-6)
    assert round(5000 / DIMS, 3) == 0.305
    assert beta_for_dims(4 * 128 * 128) == 20_000


def ddpo(log_prob_mean, old_mean, advantage, clip):
    """TRL's and ddpo-pytorch's loss of one step."""
    ratio = torch.exp(log_prob_mean - old_mean)
    clipped = torch.clamp(ratio, 1 - clip, 1 + clip)
    return torch.mean(torch.maximum(-advantage * ratio, -advantage * clipped))


@pytest.mark.parametrize("moved", [1e-6, 1e-3])
def test_the_clip_carries_over_and_the_gradient_is_times_the_dimensions(moved):
    generator = torch.Generator().manual_seed(0)
    shape, std = (8, 4, 64, 64), torch.tensor(0.3)
    old_mean = torch.randn(shape, generator=generator)
    x_s = old_mean + std * torch.randn(shape, generator=generator)
    mean = (old_mean + moved * torch.randn(shape, generator=generator)).requires_grad_()
    advantage, clip = torch.randn(8, generator=generator), 1e-5
    # Gaussian's own density, in doubles where the ratio near 1 would lose its digits.
    new, old = (Gaussian(one.double(), std.double()).log_prob(x_s.double()) for one in (mean, old_mean))
    ours = clipped_surrogate(new, old, advantage.double(), num_dims=DIMS, clip=clip)
    theirs = ddpo(new / DIMS, old / DIMS, advantage.double(), clip)
    assert ours.is_clipped.any() == (moved == 1e-3)
    (one,) = torch.autograd.grad(ours.loss.mean(), mean, retain_graph=True)
    (other,) = torch.autograd.grad(theirs, mean)
    torch.testing.assert_close(one, DIMS * other, rtol=1e-3, atol=1e-7)


def test_nats_of_a_clip():
    nats = 1e-4 * DIMS
    assert [round(nats, 2), round(nats / 256, 4), round(nats / 65_536, 6)] == [1.64, 0.0064, 2.5e-5]
    assert (50 * DIMS, MAX_ADVANTAGE) == (819_200, 5)


def test_advantages_of_a_buffer_of_32_and_a_minimum_of_16_are_those_of_a_history_of_32():
    """And a history without end is TRL's default, one mean and spread for all."""
    generator = torch.Generator().manual_seed(0)
    kept, endless, stats = PromptHistory(32), PromptHistory(1_000_000), {"a": [], "b": []}
    for _ in range(6):
        rewards, prompts = torch.rand(12, generator=generator), ["a", "b", "b"] * 4
        expected = torch.empty(12)
        for prompt in stats:
            own = torch.tensor([one == prompt for one in prompts])
            stats[prompt] = (stats[prompt] + rewards[own].tolist())[-32:]
            past = torch.tensor(stats[prompt]) if len(stats[prompt]) >= 16 else rewards
            expected[own] = (rewards[own] - past.mean()) / (past.std(correction=0) + 1e-6)
        assert torch.allclose(kept.advantages(rewards, prompts), expected, rtol=2e-3, atol=1e-4)
        plain = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-8)
        assert torch.allclose(endless.advantages(rewards, prompts), plain, rtol=2e-3, atol=1e-4)
