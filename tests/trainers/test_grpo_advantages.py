"""What an image is worth to GRPO: each reward compared by itself, then weighted; only the weights' ratio counts."""

import pytest
import torch

from rpo.objectives.advantages import group_normalize
from tests.trainers.online_runs import grpo


def corner(images, prompts):
    return images[:, 0, 0, 0]


def contrast(images, prompts):
    return 100 * images.std(dim=(1, 2, 3))


def advantages(folder, first, second, **changes):
    rewards = {f"{__name__}:corner": first, f"{__name__}:contrast": second}
    trainer = grpo(folder, reward=rewards, **changes)
    rollout = trainer.algorithm.collector.draw(0)
    return trainer.algorithm.advantages(rollout), list(rollout.parts.values()), rollout.group


@pytest.mark.parametrize(("scale", "second"), [("group", 1.0), ("batch", -1.0)])
def test_rewards_are_compared_before_they_are_weighted(tmp_path, scale, second):
    """One is a hundred times as wide as the other: neither drowns, and a penalty counts as much as a reward."""
    found, parts, group = advantages(tmp_path, 3.0, second, scale=scale)
    assert parts[1].std() > 5 * parts[0].std()
    each = [group_normalize(part, group, scale=scale) for part in parts]
    assert torch.allclose(found, (3 * each[0] + second * each[1]) / 4, atol=1e-5)


def test_only_the_ratio_of_the_weights_counts(tmp_path):
    small, large = (advantages(tmp_path, *weights)[0] for weights in ((0.3, -0.1), (30.0, -10.0)))
    assert small.abs().max() > 0.1
    assert torch.allclose(small, large, atol=1e-5)


def test_what_stands_out_is_cut_on_either_side(tmp_path, monkeypatch):
    monkeypatch.setattr("rpo.trainers.grpo.MAX_ADVANTAGE", 0.3)
    found = advantages(tmp_path, 1.0, 1.0)[0]
    assert (found.min().item(), found.max().item()) == pytest.approx((-0.3, 0.3))
