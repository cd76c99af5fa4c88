"""What a preference run visits: every time of the schedule, from any update on the same, and known by all it is."""

from collections import Counter
from itertools import islice

import pytest

from tests.tiny import tiny_sd
from tests.trainers.pair_runs import trainer_of

VISITS = 800


@pytest.fixture(scope="module")
def batches_of(tmp_path_factory):
    pipe = tiny_sd()

    def made(**changes):
        folder = tmp_path_factory.mktemp("run")
        pipe.unload_lora_weights()
        return trainer_of(folder, pipe=pipe, **changes).algorithm.data

    return made


@pytest.fixture(scope="module")
def many(batches_of):
    return batches_of().at(range(VISITS))


def test_every_pair_is_visited_alike_at_times_that_cover_the_schedule(many):
    assert Counter(many.pairs) == {pair: VISITS // 8 for pair in range(8)}
    timesteps = many.timestep.double()
    assert timesteps.min() < 10 and timesteps.max() > 989
    assert timesteps.mean().item() == pytest.approx(499.5, abs=30)


def test_every_visit_has_noise_of_its_own(many):
    assert len(many.eps.unique(dim=0)) == VISITS


def test_captions_are_dropped_at_their_rate(many):
    is_dropped = (many.conditioning.tokens == many.conditioning.negative["tokens"]).flatten(1).all(dim=1)
    assert is_dropped.double().mean().item() == pytest.approx(0.2, abs=0.04)


def test_each_side_has_a_posterior_draw_of_its_own(many):
    """Apart from the means of its two images."""
    sides = [side[[row for row, pair in enumerate(many.pairs) if pair == 0]] for side in many.x_0.chunk(2)]
    noise = [(side - side.mean(dim=0)).flatten() for side in sides]
    together = (noise[0] * noise[1]).mean() / (noise[0].std() * noise[1].std())
    assert noise[0].std() > 0 and abs(together.item()) < 0.05


def test_from_any_update_on_the_batches_are_those_of_the_whole_run(batches_of):
    batches = batches_of(learning={"micro_batch": 2})
    assert batches.share.accumulate == 2
    whole = [batch.draws for batch in islice(batches(0), 6)]
    assert [batch.draws for batch in islice(batches(2), 2)] == whole[4:]
    assert len(set(whole)) == 6


@pytest.mark.parametrize("changes", [{"caption_dropout": 1.0}, {"seed": 1}, {"flip": True}])
def test_a_visit_is_known_by_all_that_its_errors_depend_on(batches_of, changes):
    """What is kept of one is not taken for another's, whose caption, noise or pixels differ."""
    ours, theirs = (set(batches_of(**{"caption_dropout": 0.0} | some).at(range(16)).draws) for some in ({}, changes))
    assert len(ours) == len(theirs) == 16
    assert len(ours & theirs) < 16 if "flip" in changes else not ours & theirs
