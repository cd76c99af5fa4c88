"""The baseline of DDPO: a prompt's own past once there is enough of it, the rollout's until then."""

import math

import pytest
import torch

from rpo.trainers.rollouts.prompt_history import PromptHistory


def test_a_prompt_with_little_past_is_compared_with_the_whole_rollout():
    history = PromptHistory(6)
    rewards = torch.tensor([1.0, 2.0, 6.0, 7.0])
    found = history.advantages(rewards, ["a", "a", "b", "b"], eps=0.0)
    assert found.tolist() == pytest.approx(((rewards - 4) / rewards.std(correction=0)).tolist())


def test_a_prompt_with_enough_past_is_compared_with_it():
    history = PromptHistory(6)
    history.advantages(torch.tensor([1.0, 3.0, 100.0]), ["a", "a", "b"])
    found = history.advantages(torch.tensor([8.0, 50.0]), ["a", "b"], eps=0.0)
    past = torch.tensor([1.0, 3.0, 8.0])
    assert found[0].item() == pytest.approx(((8 - past.mean()) / past.std(correction=0)).item())
    assert found[1].item() == pytest.approx(1.0)  # of the rollout's 8 and 50


def test_only_the_last_rewards_are_remembered():
    history = PromptHistory(2)
    history.advantages(torch.tensor([1000.0, 1.0]), ["a", "a"])
    assert history.advantages(torch.tensor([3.0]), ["a"], eps=0.0).tolist() == [1.0]  # of 1 and 3


def test_equal_rewards_are_worth_nothing():
    assert PromptHistory(4).advantages(torch.full((3,), 0.1), ["a"] * 3).tolist() == [0, 0, 0]


def test_resumed_it_remembers_the_same_and_forgets_as_soon():
    whole, resumed = PromptHistory(3), PromptHistory(3)
    whole.advantages(torch.tensor([5.0, 1.0, 2.0]), ["a", "a", "b"])
    resumed.load_state_dict(whole.state_dict())
    for rewards in (torch.tensor([3.0, 4.0, 9.0]), torch.tensor([-1.0, 0.5, 7.0])):
        prompts = ["a", "b", "a"]
        assert torch.equal(whole.advantages(rewards, prompts), resumed.advantages(rewards, prompts))
    assert whole.state_dict() == resumed.state_dict()


def test_what_could_not_be_judged_is_not_remembered_and_is_worth_nothing():
    history, other = PromptHistory(4), PromptHistory(4)
    found = history.advantages(torch.tensor([1.0, math.nan, 6.0, 5.0, math.nan]), ["a", "a", "b", "a", "c"], eps=0.0)
    expected = other.advantages(torch.tensor([1.0, 6.0, 5.0]), ["a", "b", "a"], eps=0.0)
    assert found.tolist() == [expected[0], 0, expected[1], expected[2], 0]
    assert expected[0].item() == pytest.approx(-1)  # of 1 and 5
    assert history.state_dict() == other.state_dict() == {"a": [1, 5], "b": [6]}
