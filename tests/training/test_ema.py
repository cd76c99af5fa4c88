"""The average against its recursion, and that swapping it in never costs the live weights."""

import pytest
import torch
from torch import nn

from rpo.training.ema import ExponentialAverage


def test_equals_the_recursion_with_warm_up():
    param = nn.Parameter(torch.tensor([1.0, -2.0]))
    ema = ExponentialAverage([param], 0.5)
    expected = param.detach().clone()
    for n in range(30):
        with torch.no_grad():
            param.mul_(1.1).add_(0.3)
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * param.detach()
        torch.testing.assert_close(ema.averages[0], expected)  # each time: in the end nothing is left of the warm-up
    assert (1 + 29) / (10 + 29) > 0.5  # both branches of the warm-up were used


def test_applied_swaps_and_restores_to_the_bit():
    params = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4))]
    ema = ExponentialAverage(params, 0.9)
    start = [p.detach().clone() for p in params]
    with torch.no_grad():
        for param in params:
            param.add_(1.0)
    live = [p.detach().clone() for p in params]
    with ema.applied():
        assert all(torch.equal(p, s) for p, s in zip(params, start, strict=True))
    assert all(torch.equal(p, value) for p, value in zip(params, live, strict=True))


def test_applied_restores_after_an_exception():
    param = nn.Parameter(torch.zeros(2))
    ema = ExponentialAverage([param], 0.9)
    with torch.no_grad():
        param.fill_(5.0)
    with pytest.raises(RuntimeError, match="inside"), ema.applied():
        raise RuntimeError("inside")
    assert param.tolist() == [5.0, 5.0]


def test_writing_to_the_parameters_inside_the_block_reaches_neither_average_nor_live_weights():
    param = nn.Parameter(torch.full((2,), 5.0))
    ema = ExponentialAverage([param], 0.9)
    with ema.applied(), torch.no_grad():
        param.fill_(77.0)
    assert param.tolist() == [5.0, 5.0]
    assert ema.averages[0].tolist() == [5.0, 5.0]


def test_averages_of_half_precision_parameters_are_float32():
    ema = ExponentialAverage([nn.Parameter(torch.ones(2, dtype=torch.bfloat16))], 0.999)
    assert ema.averages[0].dtype == torch.float32


def test_state_continues_where_it_was():
    param = nn.Parameter(torch.ones(3))
    first = ExponentialAverage([param], 0.9)
    first.update()
    second = ExponentialAverage([param], 0.9)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        param.add_(2.0)
    first.update()
    second.update()
    assert torch.equal(first.averages[0], second.averages[0])
