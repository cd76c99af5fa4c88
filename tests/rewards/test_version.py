"""Versions of rewards: equal for equal weights wherever they lie, and other for whatever decides the score."""

import shutil
from functools import partial

import torch
from safetensors.torch import save_file

from rpo.rewards import adapt, load_reward
from rpo.rewards.aesthetic import aesthetic
from rpo.rewards.clip import ClipReward, clip_score
from rpo.rewards.jpeg import COMPRESSIBILITY
from rpo.rewards.version import EmbedsImages, version_of
from rpo.rewards.weights import LinearHead
from tests.rewards.clip_models import DIM, save_clip


def mine(images, prompts, *, power=1):
    return images.mean((1, 2, 3)) ** power


def test_equal_weights_are_of_one_version_wherever_they_lie(tmp_path):
    save_clip(tmp_path / "clip")
    shutil.copytree(tmp_path / "clip", tmp_path / "copy")
    version = version_of(clip_score(str(tmp_path / "clip")))
    assert version == version_of(load_reward(f"clip-score:{tmp_path / 'copy'}"))
    others = [ClipReward(tmp_path / "clip", scale=2.5), ClipReward(tmp_path / "clip", scale=100.0, is_clamped=True)]
    reward = clip_score(str(tmp_path / "copy"))
    reward.embed_images(torch.zeros(1, 3, 32, 32))
    with torch.no_grad():
        reward._loaded.model.visual_projection.weight[0, 0] += 1e-3
    assert len({version, *map(version_of, [*others, reward])}) == 4


def test_a_head_counts_beside_the_model(tmp_path):
    for number, place in enumerate(("a", "b")):
        save_clip(tmp_path / place)
        torch.manual_seed(number)
        save_file(LinearHead(DIM).state_dict(), tmp_path / place / "aesthetic-model.safetensors")
    one, other = aesthetic(str(tmp_path / "a")), aesthetic(str(tmp_path / "b"))
    assert version_of(one) != version_of(other)
    assert one.clip.version() == other.clip.version()
    images = torch.rand(2, 3, 32, 32)
    assert isinstance(one, EmbedsImages) and torch.equal(one.embed_images(images), other.embed_images(images))


def test_a_function_is_of_its_file():
    versions = {version_of(one) for one in (mine, partial(mine, power=2), adapt(mine), load_reward(f"{__name__}:mine"))}
    assert len(versions) == 1 and versions.pop().startswith("code ")
    assert version_of(COMPRESSIBILITY) != version_of(mine)
    assert version_of(len) == repr(len)
