import pytest
import torch

from rpo.rewards.base import FunctionReward, RewardError, score


def test_the_function_sees_images_and_prompts():
    images = torch.rand(2, 3, 8, 8)
    seen = []

    def recording(images, prompts):
        seen.append((images, prompts))
        return [3, 4]

    assert FunctionReward(recording)(images, ["a", "b"]).tolist() == [3, 4]
    assert seen[0][0] is images and seen[0][1] == ["a", "b"]


def test_a_wrapped_function_fails_with_the_words_of_a_bare_one():
    def short(images, prompts):
        return [1.0]

    messages = []
    for reward in (short, FunctionReward(short)):
        with pytest.raises(RewardError) as caught:
            score(reward, torch.rand(2, 3, 8, 8), ["a", "b"], name="r")
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert messages[0].startswith("reward 'r', image 0 ('a') and 1 more: returned 1 numbers for 2 images; expected ")
