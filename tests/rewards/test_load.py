import doctest
import importlib
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from rpo.curation.vlm.graded_judge import GRADED_JUDGE
from rpo.curation.vlm.vqa_score import VQA_SCORE
from rpo.errors import InputError
from rpo.rewards import OF_CHECKPOINT, REWARDS, WeightedRewards, load_reward, load_rewards
from rpo.rewards.aesthetic import AESTHETIC
from rpo.rewards.clip import CLIP_SCORE, PICK_SCORE
from rpo.rewards.composition import COMPOSITION
from rpo.rewards.differentiable import with_gradient
from rpo.rewards.function import FunctionReward
from rpo.rewards.hps import HPS_V2, HPS_V2_1
from rpo.rewards.hpsv3 import HPS_V3
from rpo.rewards.image_reward import IMAGE_REWARD
from rpo.rewards.jpeg import COMPRESSIBILITY, JpegReward
from rpo.rewards.ocr import OCR
from rpo.shapes.potential import POTENTIAL, POTENTIAL_OF_TOKENS
from rpo.shapes.proxy import REWARD
from rpo.shapes.reward import GRADED, ShapesReward
from rpo.words.reward import JUDGE

MODULES = {place.partition(":")[0] for place in REWARDS.values()} | {"rpo.rewards"}
MODULES |= {f"rpo.rewards.{name}" for name in ("base", "function", "detector", "remote.client")}
WITHOUT_EXAMPLE = {"rpo.rewards.hps", "rpo.shapes.proxy", "rpo.shapes.potential"}
SEEING = ("vqa-score", "graded-judge", "composition")
"""Those that are asked in words what an image shows."""

PUBLISHED = {*OF_CHECKPOINT, "ocr"}
"""Rewards that read a checkpoint from the hub, or need an extra; the tests of each have the same class with a small one
on disk."""

WORLDS = {"words-judge": (16, 48, ['the word "CAT"', 'the word "BEN"'])}
"""Height, width and prompts of a world of its own."""

CUSTOM = """
class Bright:
    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))

class NeedsPath:
    def __init__(self, path):
        self.path = path

def length(images, prompts):
    return [len(prompt) for prompt in prompts]

bright, number = Bright(), 3
"""


@pytest.fixture
def custom(tmp_path, monkeypatch):
    (tmp_path / "custom_rewards.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("custom_rewards")
    del sys.modules["custom_rewards"]


@pytest.mark.parametrize("name", sorted(REWARDS.keys() - PUBLISHED))
def test_every_name_gives_a_reward_that_scores(name):
    height, width, prompts = WORLDS.get(name, (64, 64, ["a red circle", "a blue square"]))
    assert load_reward(name)(torch.ones(2, 3, height, width), prompts).shape == (2,)


def test_names_are_what_they_say():
    assert [load_reward(name) for name in SEEING[:2]] == [VQA_SCORE, GRADED_JUDGE]
    assert load_reward(SEEING[2]) == FunctionReward(COMPOSITION, takes_metadata=True)
    known = {
        "shapes": ShapesReward("graded"),
        "shapes-strict": ShapesReward("strict"),
        "shapes-critic": ShapesReward("critic"),
        "words-judge": JUDGE,
        "jpeg-compressibility": JpegReward(is_small_good=True),
        "jpeg-incompressibility": JpegReward(is_small_good=False),
        "clip-score": CLIP_SCORE,
        "pick-score": PICK_SCORE,
        "shapes-clip": REWARD,
        "shapes-potential": POTENTIAL,
        "shapes-tokens-potential": POTENTIAL_OF_TOKENS,
        "aesthetic": AESTHETIC,
        "hps-v2": HPS_V2,
        "hps-v2.1": HPS_V2_1,
        "hps-v3": HPS_V3,
        "image-reward": IMAGE_REWARD,
        "ocr": OCR,
    }
    assert {name: load_reward(name) for name in known} == known


def test_the_table_of_the_pages_has_them_all():
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    rows = dict(re.findall(r"^\| `([\w.-]+)` \| [^|]+ \| (yes|no) \|", page, re.MULTILINE))
    assert set(rows) == set(REWARDS)
    assert {name for name in rows if rows[name] == "yes"} == set(with_gradient())


def test_places_in_modules(custom):
    assert isinstance(load_reward("custom_rewards:Bright"), custom.Bright)
    assert load_reward("custom_rewards:bright") is custom.bright
    assert load_reward("custom_rewards:length") == FunctionReward(custom.length)


def test_objects(custom):
    assert load_reward(custom.bright) is custom.bright
    assert isinstance(load_reward(custom.Bright), custom.Bright)
    assert load_reward(custom.length) == FunctionReward(custom.length)
    bound = partial(custom.length)
    assert load_reward(bound) == FunctionReward(bound)


ERRORS = {
    "shape": "no reward 'shape'.*pick-score.*nearest is 'shapes'",
    "jpeg_compressibility": "no reward 'jpeg_compressibility'.*nearest is 'jpeg-compressibility'",
    "clip-score:": "'clip-score:' names no checkpoint.*FOLDER",
    "jpeg-compressibility:fox": "'jpeg-compressibility:fox' takes no checkpoint.*clip-score, pick-score.*':fox'",
    "no_such_module:Reward": "'no_such_module:Reward'.*No module named 'no_such_module'.*PYTHONPATH",
    "custom_rewards:lenght": "'custom_rewards:lenght'.*has no 'lenght'.*nearest is 'length'",
    "custom_rewards:number": "'custom_rewards:number' is of type int.*cannot be called",
    "rewards/mine.py:Reward": "'rewards/mine.py:Reward' is no place in a module",
    "custom_rewards:": "'custom_rewards:' is no place in a module",
    "custom_rewards:NeedsPath": "'custom_rewards:NeedsPath' is a class.*without arguments.*'path'",
}


@pytest.mark.parametrize("spec", ERRORS)
def test_errors_say_what_to_do(spec, custom):
    with pytest.raises(InputError, match=ERRORS[spec]):
        load_reward(spec)


def test_weights_of_a_configuration(custom):
    rewards = load_rewards({"jpeg-compressibility": 0.1, "custom_rewards:length": 2.0})
    assert dict(rewards.weights) == {"jpeg-compressibility": 0.1, "custom_rewards:length": 2.0}
    images, prompts = torch.rand(2, 3, 16, 16), ["a", "abc"]
    expected = 0.1 * COMPRESSIBILITY(images, prompts) + 2 * torch.tensor([1.0, 3.0])
    assert torch.allclose(rewards(images, prompts), expected)


def test_a_single_reward_has_the_weight_one_and_its_own_name(custom):
    def mine(images, prompts):
        return [0.0] * len(images)

    specs = ["shapes", GRADED, mine, FunctionReward(mine), partial(mine), custom.Bright, custom.bright]
    assert [dict(load_rewards(spec).weights) for spec in specs] == [
        {"shapes": 1.0},
        {"ShapesReward": 1.0},
        {"mine": 1.0},
        {"mine": 1.0},
        {"mine": 1.0},
        {"Bright": 1.0},
        {"Bright": 1.0},
    ]


def test_weighted_rewards_stay_as_they_are():
    rewards = WeightedRewards({"mine": (GRADED, 0.5)})
    assert load_rewards(rewards) is rewards


def test_importing_rewards_loads_no_model_library():
    heavy = ("diffusers", "transformers", "accelerate", "peft", "datasets", "scipy", "rapidocr", "rpo.shapes")
    code = (
        f"import sys, rpo.rewards; [rpo.rewards.load_reward(name) for name in {sorted(PUBLISHED)}]; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_examples_in_docstrings(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0
    assert results.attempted or name in WITHOUT_EXAMPLE
