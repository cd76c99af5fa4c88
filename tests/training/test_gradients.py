"""The flat gradient against torch's own clipping and optimizers."""

import pytest
import torch
from torch import nn

from rpo.training.gradients import FlatGradients


def convolution():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))


def backward(net):
    (net(torch.ones(2, 3, 8, 8)) ** 2).sum().backward()


@pytest.mark.parametrize("max_norm", [0.1, 1e6, float("inf")])
def test_clip_equals_torchs(max_norm):
    ours, theirs = convolution(), convolution()
    gradients = FlatGradients(list(ours.parameters()))
    backward(ours)
    backward(theirs)
    norm = gradients.clip(max_norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
    torch.testing.assert_close(norm, expected)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_two_backwards_add_up_and_clear_forgets_them():
    net = convolution()
    gradients = FlatGradients(list(net.parameters()))
    backward(net)
    once = gradients.flat.clone()
    backward(net)
    torch.testing.assert_close(gradients.flat, 2 * once)
    gradients.clear()
    assert gradients.flat.abs().max() == 0
    assert all(p.grad.abs().max() == 0 for p in net.parameters())


def test_channels_last_gradients_have_the_strides_of_their_parameters():
    net = convolution().to(memory_format=torch.channels_last)
    FlatGradients(list(net.parameters()))
    backward(net)
    assert all(p.grad.stride() == p.stride() for p in net.parameters())
    reference = convolution()
    backward(reference)
    for a, b in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_gradient_replaced_behind_its_back_is_noticed():
    net = convolution()
    gradients = FlatGradients(list(net.parameters()))
    net.zero_grad(set_to_none=True)
    backward(net)
    with pytest.raises(AssertionError, match=r"a \.grad was replaced"):
        gradients.clip(1.0)


def test_release_leaves_no_gradient():
    net = convolution()
    FlatGradients(list(net.parameters())).release()
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([], "params is empty; expected the parameters to train: add an adapter or unfreeze some first"),
        (
            [nn.Parameter(torch.zeros(1), requires_grad=False)],
            r"params\[0\] has requires_grad=False; expected trainable",
        ),
        ([nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))], r"params\[0\] is torch.bfloat16; expected float32"),
        ([nn.Parameter(torch.zeros(1))] * 2, "holds a parameter twice; expected each once"),
        (
            [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1, dtype=torch.float64))],
            r"params\[1\] is torch.float64 on cpu, but params\[0\] is torch.float32 on cpu; expected one",
        ),
    ],
)
def test_unsuitable_parameters_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        FlatGradients(params)
