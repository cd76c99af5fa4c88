"""Running statistics: numbers, what is behind them, and their life in a checkpoint."""

import pytest
import torch

from rpo.trainers.pairs.running_statistics import RunningStatistics
from rpo.training.processes import Processes

CPU = torch.device("cpu")


def drawn(seed, count=4000):
    generator = torch.Generator().manual_seed(seed)
    bins = torch.randint(3, (count,), generator=generator)
    values = torch.randn(count, generator=generator) * torch.tensor([0.5, 1.0, 2.0])[bins] + 0.3
    return values, bins


def test_nothing_seen_is_one_and_zero():
    moments = RunningStatistics(3, decay=0.9, device=CPU)
    assert moments.relative_std().tolist() == [1, 1, 1]
    assert moments.mean().item() == 0


def test_std_is_that_of_each_bin_in_units_of_their_mean():
    moments = RunningStatistics(3, decay=1.0, device=CPU)
    values, bins = drawn(0)
    moments.observe(values, bins)
    assert moments.relative_std().tolist() == [1, 1, 1]  # what an update sees counts from the next one on
    moments.advance(Processes())
    expected = torch.stack([values[bins == index].std() for index in range(3)])
    torch.testing.assert_close(moments.relative_std(), expected / expected.mean(), rtol=0.04, atol=0)
    assert moments.mean().item() == pytest.approx(values.mean().item(), abs=1e-5)
    assert moments.relative_std().mean().item() == pytest.approx(1)


def test_a_bin_that_was_never_drawn_has_the_std_of_all():
    moments = RunningStatistics(3, decay=1.0, device=CPU)
    values, bins = drawn(0)
    moments.observe(values[bins < 2], bins[bins < 2])
    moments.advance(Processes())
    low, high, unseen = moments.relative_std().tolist()
    assert low < unseen < high


def test_a_rare_bin_leans_on_sixteen_samples_of_all():
    """Also where the numbers lie far from 0: what counts is how far they lie from their means."""
    moments = RunningStatistics(2, decay=1.0, device=CPU)
    values, bins = torch.cat([drawn(0, 96)[0], torch.full((4,), 0.3)]) + 5, (torch.arange(100) >= 96).long()
    moments.observe(values, bins)
    moments.advance(Processes())
    about = [((values[bins == index] - values[bins == index].mean()) ** 2).sum() for index in range(2)]
    pooled = values.var(correction=0)
    expected = torch.stack([((about[0] + 16 * pooled) / (96 + 16)).sqrt(), ((0 + 16 * pooled) / (4 + 16)).sqrt()])
    torch.testing.assert_close(moments.relative_std(), expected / expected.mean(), rtol=1e-3, atol=0)


def test_the_split_of_an_update_does_not_matter_and_the_past_decays():
    whole, parts = (RunningStatistics(3, decay=0.5, device=CPU) for _ in range(2))
    values, bins = drawn(1, 64)
    whole.observe(values, bins)
    for some in torch.arange(64).split(16):
        parts.observe(values[some], bins[some])
    whole.advance(Processes())
    parts.advance(Processes())
    torch.testing.assert_close(whole.relative_std(), parts.relative_std())
    whole.observe(torch.zeros(64), bins)
    whole.advance(Processes())
    assert whole.mean().item() == pytest.approx(values.mean().item() / 3, rel=1e-4)  # 0.5 against 1


def test_a_saved_state_continues_to_the_bit():
    one, other = (RunningStatistics(3, decay=0.9, device=CPU) for _ in range(2))
    one.observe(*drawn(2, 50))
    one.advance(Processes())
    other.load_state_dict(one.state_dict())
    for moments in (one, other):
        moments.observe(*drawn(3, 50))
        moments.advance(Processes())
    assert torch.equal(one.relative_std(), other.relative_std())


class Alone:
    """A process by itself, which tells what it would have told others."""

    count = 1

    def average(self, tensor):
        self.told = tensor.clone()


class OneOfTwo:
    """One of two processes, which learns of the other's numbers."""

    count = 2

    def __init__(self, other):
        self.other = other

    def average(self, tensor):
        tensor.copy_((tensor + self.other) / 2)


def test_two_processes_have_the_moments_of_one():
    values, bins = drawn(4, 64)
    one, whole = (RunningStatistics(3, decay=0.9, device=CPU) for _ in range(2))
    other = RunningStatistics(3, decay=0.9, device=CPU)
    one.observe(values[:32], bins[:32])
    other.observe(values[32:], bins[32:])
    whole.observe(values, bins)
    alone = Alone()
    other.advance(alone)
    one.advance(OneOfTwo(alone.told))
    whole.advance(Processes())
    torch.testing.assert_close(one.relative_std(), whole.relative_std())
    torch.testing.assert_close(one.mean(), whole.mean())
