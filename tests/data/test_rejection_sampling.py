"""RSO: accepted samples follow the tilted distribution, labels follow Bradley-Terry, nothing is used twice."""

import math

import pytest

from rpo.data.rejection_sampling import accepted, rejection_sampled_pairs


def test_samples_are_accepted_as_often_as_the_tilt_says():
    rewards, temperature = [0.0, 0.5, 1.0], 0.7
    counts = [0, 0, 0]
    for seed in range(3000):
        for index in accepted(rewards, temperature=temperature, seed=seed, key="a"):
            counts[index] += 1
    expected = [math.exp((reward - 1.0) / temperature) for reward in rewards]
    assert [count / 3000 for count in counts] == pytest.approx(expected, abs=0.03)
    assert counts[2] == 3000


def test_a_cold_tilt_keeps_the_best_and_a_hot_one_everything():
    rewards = [0.1, 0.9, 0.5, 0.9]
    assert accepted(rewards, temperature=1e-9, seed=0, key="a") == [1, 3]
    assert accepted(rewards, temperature=math.inf, seed=0, key="a") == [0, 1, 2, 3]
    assert accepted([], temperature=1.0, seed=0, key="a") == []


def test_labels_are_bradley_terry_draws():
    wins = 0
    for seed in range(2000):
        ((chosen, _),) = rejection_sampled_pairs(
            [0.0, 1.0], temperature=math.inf, label_temperature=0.8, seed=seed, key="a"
        )
        wins += chosen
    assert wins / 2000 == pytest.approx(1 / (1 + math.exp(-1 / 0.8)), abs=0.03)


def test_no_sample_is_used_twice_ties_are_left_out_and_draws_repeat():
    rewards = [0.0, 0.2, 0.2, 0.4, 0.6, 0.8, 1.0]
    for seed in range(50):
        pairs = rejection_sampled_pairs(rewards, temperature=1.0, label_temperature=0.0, seed=seed, key="a")
        used = [index for pair in pairs for index in pair]
        assert len(used) == len(set(used))
        assert all(rewards[chosen] > rewards[rejected] for chosen, rejected in pairs)
        assert pairs == rejection_sampled_pairs(rewards, temperature=1.0, label_temperature=0.0, seed=seed, key="a")
    keys = {
        tuple(rejection_sampled_pairs(rewards, temperature=9.0, label_temperature=0.0, seed=0, key=str(key)))
        for key in range(9)
    }
    assert len(keys) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; expected a number > 0"),
        ({"label_temperature": -1.0}, "label_temperature is -1.0; expected a number >= 0"),
        ({"rewards": [0.1, math.nan]}, "a: reward 1 is nan; expected finite numbers"),
    ],
)
def test_numbers_out_of_range_are_refused(changes, message):
    settings = {"rewards": [0.1, 0.2], "temperature": 1.0, "label_temperature": 0.0, "seed": 0, "key": "a"} | changes
    with pytest.raises(ValueError, match=message):
        rejection_sampled_pairs(settings.pop("rewards"), **settings)
