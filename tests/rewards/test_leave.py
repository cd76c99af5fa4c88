"""Reward models that go to the main memory between rollouts, and come back when they are asked."""

import pytest
import torch
from torch import nn

from rpo.rewards import load_reward, load_rewards
from rpo.rewards.base import CanLeave
from tests.rewards.clip_models import DIM, EDGE, save_clip
from tests.rewards.test_aesthetic import tiny_head
from tests.rewards.test_hpsv3 import save_hpsv3
from tests.rewards.test_image_reward import save_image_reward

NETWORKS = {"clip-score": 1, "aesthetic": 2, "image-reward": 3, "hps-v3": 2}
"""What each is made of."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in ("clip", "blip", "qwen"):
        (folder / name).mkdir()
    torch.save(tiny_head(DIM), save_clip(folder / "clip") / "aesthetic-model.pth")
    save_image_reward(folder / "blip")
    save_hpsv3(folder / "qwen")
    return folder


def reward_of(name, folder):
    return load_rewards(f"{name}:{folder / {'image-reward': 'blip', 'hps-v3': 'qwen'}.get(name, 'clip')}")


def pictures(device="cpu"):
    return torch.rand(3, 3, EDGE, EDGE, generator=torch.Generator().manual_seed(1)).to(device)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_of_a_reward_leaves_and_its_scores_stay(name, folder, monkeypatch):
    rewards, prompts = reward_of(name, folder), ["a", "b", "c"]
    assert all(isinstance(one, CanLeave) for one in rewards.each.values())
    rewards.leave()  # nothing is loaded yet
    before = rewards(pictures(), prompts)
    gone = []
    moved = nn.Module.to
    monkeypatch.setattr(nn.Module, "to", lambda self, *how: gone.append((self, *how)) or moved(self, *how))
    rewards.leave()
    assert [place for _, place in gone] == ["cpu"] * NETWORKS[name]
    assert torch.equal(rewards(pictures(), prompts), before)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NETWORKS)
def test_they_take_no_memory_of_the_accelerator_when_they_have_left(name, folder):
    rewards, prompts = reward_of(name, folder), ["a", "b", "c"]
    images = pictures("cuda")
    rewards(images, prompts)  # whatever is made at a first use stays
    rewards.leave()
    before = torch.cuda.memory_allocated()
    first = rewards(images, prompts)
    held = torch.cuda.memory_allocated()
    rewards.leave()
    assert held > before
    assert torch.cuda.memory_allocated() - before <= first.numel() * 512
    assert torch.allclose(rewards(images, prompts), first)


def test_a_function_has_nothing_to_take_along():
    load_rewards(lambda images, prompts: [0.0] * len(prompts)).leave()
    assert not isinstance(load_reward("jpeg-compressibility"), CanLeave)
