"""What is drawn does not depend on the type or the device that the caller made torch's default."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from rpo.data.order import GroupedOrder, epoch_order
from rpo.models.checkpoint import Checkpoint
from rpo.process.continuous import jittered_times
from rpo.process.schedule import RectifiedFlow
from rpo.randomness import keyed_generator
from rpo.sampling.sample import generate
from tests.tiny import tiny_sd


@contextmanager
def default_type(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def images(model: Checkpoint) -> Tensor:
    return generate(model, ["a cat"], seed=1, num_steps=2, eta=1.0, guidance_scale=1.0, batch_size=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_images_are_those_of_any_default_type(dtype: torch.dtype) -> None:
    model = Checkpoint(tiny_sd())
    usual = images(model)
    with default_type(dtype):
        assert torch.equal(images(model), usual)


DRAWS: list[Callable[[], object]] = [
    lambda: epoch_order.__wrapped__(9, 1, 2),
    lambda: list(map(GroupedOrder([5, 3], 2, 1).visit, range(30))),
    lambda: jittered_times(RectifiedFlow(), 6, keyed_generator("here"), jitter=0.5).tolist(),
]


@pytest.mark.parametrize("draw", DRAWS)
def test_draws_are_those_of_any_default_device_and_type(draw: Callable[[], object]) -> None:
    usual = draw()
    with default_type(torch.float64), torch.device("meta"):
        again = draw()
    assert again == usual
