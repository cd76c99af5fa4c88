"""What is made ahead is what would have been made, in the same order, and an error in it waits for its turn."""

import dataclasses
import sys
from itertools import count

import pytest
import torch

from rpo.training.ahead import Ahead
from rpo.training.loop import fit
from rpo.training.step import Accumulator
from tests.training.toy import LOOP, names, plain_loss, toy_batches, toy_model

UPDATES = 3


def test_an_item_that_was_made_is_given_once_and_in_order():
    asked = []
    ahead = Ahead(asked.append(number) or number for number in count())
    assert next(ahead) == 0
    ahead.make_next()
    ahead.make_next()
    assert asked == [0, 1]
    assert [next(ahead), next(ahead)] == [1, 2]


def test_an_error_and_an_end_come_when_they_are_asked_for():
    def items():
        yield 0
        raise ValueError("a broken record")

    for ahead, error in ((Ahead(items()), ValueError), (Ahead(iter([0])), StopIteration)):
        assert next(ahead) == 0
        ahead.make_next()
        with pytest.raises(error):
            next(ahead)


@pytest.mark.parametrize("draws_ahead", [True, False])
def test_the_next_micro_batch_is_made_before_the_device_is_waited_for(draws_ahead, tmp_path, monkeypatch):
    events, model = [], toy_model()
    loop, loss, tolist = (
        dataclasses.replace(LOOP, updates=UPDATES, accumulate=2),
        plain_loss(model),
        torch.Tensor.tolist,
    )

    def batches(first):
        for batch in toy_batches(4, accumulate=2)(first):
            events.append("draw")
            yield batch

    def read(tensor):
        if sys._getframe(1).f_code is Accumulator.run.__code__:
            events.append("read")
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", read)
    fit(batches, loss, list(model.parameters()), loop, folder=tmp_path, names=names, draws_ahead=draws_ahead)
    # In the last update nothing more is drawn.
    assert "".join(event[0] for event in events) == ("dddrddrdr" if draws_ahead else "ddrddrddr")
    plain = toy_model()
    batches = toy_batches(4, accumulate=2)
    fit(batches, plain_loss(plain), list(plain.parameters()), loop, folder=tmp_path / "plain", names=names)
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
