"""One trainer after another on one pipeline: each goes on from the adapter that the last one left."""

import pytest
import torch

from rpo.adapters.lora import EARLIER
from rpo.adapters.lora_file import inspect_lora
from rpo.errors import InputError
from rpo.models.checkpoint import Checkpoint
from tests.marks import slow_but
from tests.tiny import tiny_sd
from tests.trainers.online_runs import grpo, learning, lightness
from tests.trainers.pair_runs import trainer_of
from tests.trainers.test_warm_start import prediction

pytestmark = pytest.mark.filterwarnings("ignore:the network denoises no better")


def dpo(folder, pipe, **adapter):
    return trainer_of(folder, pipe=pipe, updates=3, learning={"learning_rate": 1e-2}, adapter={"rank": 3, **adapter})


def online(folder, pipe):
    return grpo(folder, pipe=pipe, reward=lightness, learning=learning(2))


def assert_is_one_lora_of_the_base(saved, trained, start):
    stock = tiny_sd()
    stock.load_lora_weights(str(saved))
    assert (prediction(Checkpoint(stock)) - trained).abs().max() < 1e-4 * (trained - start).abs().max()


@pytest.mark.parametrize("alpha", slow_but((5.0,), (None, 5.0)))
def test_the_second_starts_where_the_first_ended_and_holds_to_it(alpha, tmp_path):
    pipe = tiny_sd()
    first = dpo(tmp_path / "first", pipe, rank=2, alpha=alpha)
    first.train()
    start = prediction(first.run.model)
    second = online(tmp_path / "second", pipe)
    model = second.run.model
    assert torch.equal(prediction(model), start)
    assert f"starts from the LoRA {EARLIER}-1" in second.plan()
    second.train()
    with second.run.policy.reference():
        assert torch.equal(prediction(model), start)
    trained = prediction(model)
    assert (trained - start).abs().max() > 1e-4
    saved = second.save()
    assert inspect_lora(saved).ranks == (6,)
    assert_is_one_lora_of_the_base(saved, trained, start)


@pytest.mark.slow
def test_a_third_holds_to_both(tmp_path):
    pipe = tiny_sd()
    for number in range(2):
        trainer = dpo(tmp_path / str(number), pipe, rank=2)
        trainer.train()
    start = prediction(trainer.run.model)
    third = online(tmp_path / "third", pipe)
    third.train()
    with third.run.policy.reference():
        assert torch.equal(prediction(third.run.model), start)
    saved = third.save()
    assert inspect_lora(saved).ranks == (8,)
    assert_is_one_lora_of_the_base(saved, prediction(third.run.model), start)


def test_held_near_the_base_the_adapter_itself_is_trained_on(tmp_path):
    pipe = tiny_sd()
    first = dpo(tmp_path / "first", pipe, rank=2)
    first.train()
    start, base = prediction(first.run.model), prediction(Checkpoint(tiny_sd()))
    second = dpo(tmp_path / "second", pipe, reference="base")
    model = second.run.model
    assert torch.allclose(prediction(model), start, atol=1e-6)
    assert second.train().updates == 3  # not stopped because the margin does not begin at 0
    with second.run.policy.reference():
        assert torch.equal(prediction(model), base)
    saved = second.save()
    assert inspect_lora(saved).ranks == (2,)
    assert_is_one_lora_of_the_base(saved, prediction(model), start)


def test_trainers_that_were_made_and_not_trained_leave_nothing(tmp_path):
    pipe = tiny_sd()
    for number in range(3):
        trainer = dpo(tmp_path / str(number), pipe)
    assert trainer.run.policy.note == ""
    trainer.train()
    assert inspect_lora(trainer.save()).ranks == (3,)
    dpo(tmp_path / "idle", pipe)
    last = dpo(tmp_path / "last", pipe)
    assert last.run.policy.note.startswith(f"starts from the LoRA {EARLIER}-1,")


def test_a_trainer_whose_adapter_was_taken_over_neither_trains_nor_saves(tmp_path):
    pipe = tiny_sd()
    first = dpo(tmp_path / "first", pipe)
    first.train()
    saved = first.save().joinpath("pytorch_lora_weights.safetensors").read_bytes()
    dpo(tmp_path / "second", pipe)
    for act in (first.save, lambda: first.train(resume=True)):
        with pytest.raises(InputError, match="a later trainer took it over"):
            act()
    assert (tmp_path / "first/lora/pytorch_lora_weights.safetensors").read_bytes() == saved


def test_a_second_run_resumes_after_the_first_was_repeated(tmp_path):
    """In a new process the first run is resumed, too, which does nothing but load what it ended in."""

    def both(folder, updates, *, resume):
        pipe = tiny_sd()
        dpo(tmp_path / "first", pipe).train(resume=(tmp_path / "first").exists())
        second = grpo(folder, pipe=pipe, reward=lightness, learning=learning(updates))
        second.train(resume=resume)
        return prediction(second.run.model)

    whole = both(tmp_path / "whole", 2, resume=False)
    both(tmp_path / "cut", 1, resume=False)
    assert torch.equal(both(tmp_path / "cut", 2, resume=True), whole)
