"""Memory and operations of a computation, by hand."""

import torch

from rpo.trainers.checks.footprint import PeakBytes, footprint


def test_what_is_made_counts_until_it_is_gone_and_views_of_what_was_there_do_not():
    weight, x = torch.zeros(8, 4), torch.zeros(16, 4)
    with PeakBytes() as memory:
        view = weight.t()[:, :4]
        assert memory.peak == 0
        first = x @ weight.t()  # [16, 8]
        assert memory.held == 4 * 16 * 8
        second = first.clone()
        part = second[1:]
        assert memory.held == memory.peak == 2 * 4 * 16 * 8
        del first, second
        assert memory.held == 4 * 16 * 8  # of which `part` is a view
        del part, view
        assert memory.held == 0
    assert memory.peak == 2 * 4 * 16 * 8


def test_operations_are_multiplications_and_additions():
    weight, x = torch.zeros(8, 4), torch.zeros(16, 4)
    assert footprint(lambda: x @ weight.t()).flops == 2 * 16 * 4 * 8
