"""The average against its recursion, and that swapping it in never costs the live weights."""

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
