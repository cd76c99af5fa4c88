"""The loss scale against torch's GradScaler, update by update."""

import torch
from torch import nn

from rpo.training.loss_scale import GROWTH_INTERVAL, LossScale


def test_follows_torchs_grad_scaler():
    pattern = [True, False, False, *[True] * GROWTH_INTERVAL, True, False, True]
    ours = LossScale(is_dynamic=True)
    theirs = torch.amp.GradScaler("cpu")
    param = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([param], lr=0.0)
    for is_finite in pattern:
        assert ours.value == theirs.get_scale()
        theirs.scale(torch.ones(1))
        param.grad = torch.tensor([1.0 if is_finite else float("inf")])
        theirs.step(optimizer)
        theirs.update()
        ours.adjust(is_finite)
    assert ours.value == theirs.get_scale() == 2.0**14


def test_without_scaling_it_stays_one():
    scale = LossScale(is_dynamic=False)
    scale.adjust(is_finite=False)
    assert scale.value == 1.0
    assert not scale.may_shrink


def test_state_continues():
    first, second = LossScale(is_dynamic=True), LossScale(is_dynamic=True)
    first.adjust(is_finite=False)
    for _ in range(GROWTH_INTERVAL - 1):
        first.adjust(is_finite=True)
    second.load_state_dict(first.state_dict())
    second.adjust(is_finite=True)
    assert second.value == 2.0**16


def test_overflow_stops_being_an_excuse_once_the_scale_is_one():
    scale = LossScale(is_dynamic=True)
    while scale.may_shrink:
        scale.adjust(is_finite=False)
    assert scale.value == 1.0
