"""What a preference run visits: every time of the schedule, from any update on the same, and known by all it is."""

from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from rpo.trainers.dpo import DPOTrainer
from tests.tiny import tiny_sd
from tests.trainers.test_dpo import config, toy_pairs


@pytest.fixture(scope="module")
def batches_of(tmp_path_factory):
    pipe = tiny_sd()

    def made(**changes):
        folder = tmp_path_factory.mktemp("run")
        pipe.unload_lora_weights()
        return DPOTrainer(pipe, toy_pairs(), config(folder, **changes)).batches

    return made


def test_every_time_of_the_schedule_is_drawn(batches_of):
    batches = batches_of()
    batches.model = SimpleNamespace(num_train_timesteps=4)
    drawn = [batches._noise(pair, draw, torch.Size([1]))[0].item() for pair in range(8) for draw in range(8)]
    assert set(drawn) == {0, 1, 2, 3}


def test_every_visit_has_noise_of_its_own(batches_of):
    batches = batches_of()
    noise = [torch.cat(batches._noise(pair, draw, torch.Size([1]))[1:]) for pair in range(3) for draw in range(3)]
    assert len(torch.stack(noise).unique(dim=0)) == 9


def test_from_any_update_on_the_batches_are_those_of_the_whole_run(batches_of):
    batches = batches_of(micro_batch=2)
    assert batches.share.accumulate == 2
    whole = [batch.draws for batch in islice(batches(0), 6)]
    assert [batch.draws for batch in islice(batches(2), 2)] == whole[4:]
    assert len(set(whole)) == 6


@pytest.mark.parametrize("changes", [{"caption_dropout": 1.0}, {"seed": 1}, {"flip": True}])
def test_a_visit_is_known_by_all_that_its_errors_depend_on(batches_of, changes):
    """What is kept of one is not taken for another's, whose caption, noise or pixels differ."""
    ours, theirs = batches_of(caption_dropout=0.0), batches_of(**{"caption_dropout": 0.0} | changes)
    visits = [(pair, draw) for pair in range(8) for draw in range(2)]
    ours, theirs = ({batches._identity(*one) for one in visits} for batches in (ours, theirs))
    assert len(ours) == len(theirs) == 16
    assert len(ours & theirs) < 16 if "flip" in changes else not ours & theirs
