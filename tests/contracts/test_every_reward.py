"""Every reward of the package goes through every trainer that draws: three updates, finite, and the adapter moves."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch

from rpo.errors import InputError
from rpo.rewards import OF_CHECKPOINT, REWARDS, load_reward
from rpo.rewards.clip import clip_score
from rpo.rewards.composition import CompositionReward
from rpo.rewards.detector import OpenVocabularyDetector
from rpo.rewards.differentiable import is_differentiable
from rpo.rewards.hps import V2_1_FILE, V2_FILE
from rpo.training.log import read_metrics
from tests.curation.vlm.fake_server import Response, fake_server
from tests.curation.vlm.tiny_vlm import save_tiny_vlm
from tests.rewards.clip_models import DIM, save_clip
from tests.rewards.test_aesthetic import tiny_head
from tests.rewards.test_detector import save_owl
from tests.rewards.test_hps import save_hps, tiny_state
from tests.rewards.test_hpsv3 import save_hpsv3
from tests.rewards.test_image_reward import save_image_reward
from tests.trainers.online_runs import ROLLOUT, TRAINERS, UNWATCHED, learning, small_value  # noqa: F401

CIRCLE = ("a red circle", {"include": [{"class": "circle", "count": 1, "color": "red"}]})
OPEN = 'a sign that says "OPEN"'
PROMPTS = {"ocr": [OPEN], "words-judge": ['the word "CAT"'], "composition": [CIRCLE]}
OTHERS = ["a red circle", "two blue squares", "a green triangle"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small random weights of the real classes."""
    root = tmp_path_factory.mktemp("rewards")
    made = {name: root / name for name in ("clip", "hps", "blip", "owl", "vlm", "hpsv3")}
    for folder in made.values():
        folder.mkdir()
    torch.save(tiny_head(DIM), save_clip(made["clip"]) / "aesthetic-model.pth")
    for file in (V2_FILE, V2_1_FILE):
        torch.save({"state_dict": tiny_state()}, save_hps(made["hps"]) / file)
    save_image_reward(made["blip"])
    save_owl(made["owl"])
    save_tiny_vlm(made["vlm"])
    save_hpsv3(made["hpsv3"])
    return made


@pytest.fixture(scope="module")
def grades():
    """A server whose model gives a grade after the other."""
    count = itertools.count()
    with fake_server(lambda *_: Response(json.dumps({"reason": "…", "grade": next(count) % 11}))) as server:
        yield server.url


def tiny(name, folders, grades):
    """The reward of that name."""
    if name == "graded-judge":
        return f"{name}:{grades}#model"
    if name == "composition":
        return CompositionReward(OpenVocabularyDetector(str(folders["owl"])), clip_score(str(folders["clip"])))
    kinds = {"hps-v2": "hps", "hps-v2.1": "hps", "hps-v3": "hpsv3", "image-reward": "blip", "vqa-score": "vlm"}
    return f"{name}:{folders[kinds.get(name, 'clip')]}" if name in OF_CHECKPOINT else name


def pairs():
    """All; by default one reward of each kind with one trainer each."""
    kinds = [
        "shapes",
        "jpeg-compressibility",
        "ocr",
        "clip-score",
        "vqa-score",
        "graded-judge",
        "composition",
        "aesthetic",
    ]
    shown = set(zip(kinds, itertools.cycle(TRAINERS), strict=False))
    for name, trainer in itertools.product(REWARDS, TRAINERS):
        yield pytest.param(name, trainer, marks=() if (name, trainer) in shown else pytest.mark.slow)


@pytest.mark.contracts
@pytest.mark.parametrize(("name", "trainer"), pairs())
def test_three_updates(name, trainer, folders, grades, tmp_path):
    reward = load_reward(tiny(name, folders, grades))
    rollout = replace(ROLLOUT, resolution=(16, 48)) if name == "words-judge" else ROLLOUT
    own = {"reward": reward, "prompts": PROMPTS.get(name, OTHERS), "learning": learning(3), "rollout": rollout}

    def trained():
        return TRAINERS[trainer](tmp_path, **own, monitor=UNWATCHED, preflight=False).train()

    if trainer == "reward_gradient" and not is_differentiable(reward):
        with pytest.raises(InputError, match="has no gradient"):
            trained()
        return
    assert trained().updates == 3
    assert all(math.isfinite(entry["loop/loss"]) and entry["reward/failed"] == 0 for entry in read_metrics(tmp_path))
