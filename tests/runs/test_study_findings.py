"""What follows from cells whose scores are known."""

from dataclasses import replace

import numpy as np
import pytest

from rpo.data.prompt_sets import PromptSet
from rpo.runs.study_config import StudyConfig
from rpo.runs.study_findings import StudyFindings
from rpo.runs.study_judge import Base

PROMPTS = 8
SETS = {
    name: PromptSet(name, tuple(f"{name} {i}" for i in range(PROMPTS)), (name,) * PROMPTS)
    for name in ("in_domain", "out_of_domain")
}
REWARDS = {"good": "shapes", "bad": "jpeg-compressibility"}
CONFIG = StudyConfig(seeds=(0, 1), algorithms=("dpo", "grpo"), rewards=REWARDS, best_of=4)
LEVEL = {"good": 0.2, "bad": 0.1}


def candidates(count):
    """Of each prompt the k-th image has k tenths of truth; one reward likes the last and the other the first best."""
    rising = np.tile(np.arange(count) / 10, (PROMPTS, 1))
    return {"truth": rising, "good": rising, "bad": -rising}


BASE = Base({"in_domain": candidates(1), "out_of_domain": candidates(4)}, 1)


def result(algorithm, reward, seed, gain):
    scores = {name: {judge: np.full((PROMPTS, 1), gain).tolist() for judge in ("truth", *REWARDS)} for name in SETS}
    place = {"algorithm": algorithm, "reward": reward, "images_per_prompt": 4, "share": 1.0, "rounds": 1, "seed": seed}
    return {**place, "name": "", "spent": 1.0, "planned": 1.0, "scores": scores}


def findings(of_grpo=0.05):
    every = [
        result(way, reward, seed, level + (of_grpo if way == "grpo" else 0.0))
        for seed in (0, 1)
        for way in ("dpo", "grpo")
        for reward, level in LEVEL.items()
    ]
    return StudyFindings(CONFIG, BASE, SETS, tuple(every))


def test_rewards_choose_among_the_images_of_the_base():
    found = findings()
    assert found.counts == [2, 4]
    gains = {(judge, count): found.best_of(judge, count).means.gain.value for judge in REWARDS for count in (2, 4)}
    assert gains == pytest.approx({("good", 2): 0.1, ("good", 4): 0.3, ("bad", 2): 0.0, ("bad", 4): 0.0})
    assert found.ordered_before == ["good", "bad"]


def test_gains_are_those_over_the_first_image_over_all_seeds():
    found = findings()
    assert [len(group.cells) for group in found.groups] == [2] * 4
    gains = {(one.algorithm, one.reward): found.gain(one, "out_of_domain", "truth").value for one in found.center}
    assert gains == pytest.approx(
        {("dpo", "good"): 0.2, ("dpo", "bad"): 0.1, ("grpo", "good"): 0.25, ("grpo", "bad"): 0.15}
    )
    row = found.contest(found.center[0], "in_domain", "truth")
    assert (row.means.num_images, row.means.num_prompts) == (2 * PROMPTS, PROMPTS)
    assert (row.means.gain.value, row.win_rate.value) == pytest.approx((0.2, 1.0))


def test_algorithms_are_compared_over_all_rewards_and_seeds():
    (row,) = findings().contrasts("out_of_domain")
    assert row.means.name == "GRPO against DPO on ranked pairs"
    assert row.means.num_images == 2 * 2 * PROMPTS
    assert row.means.gain.value == pytest.approx(0.05)
    found = findings()
    fewer = replace(found, results=found.results[:-1])  # what has no partner is left out
    assert fewer.contrasts("out_of_domain")[0].means.num_images == 3 * PROMPTS


def test_the_order_before_is_held_against_the_order_after():
    found = findings()
    both = found.agreement(("dpo", "grpo"))
    assert both is not None and (both.value, both.low, both.high) == pytest.approx((1, 1, 1))
    upside_down = replace(found, results=tuple(result("dpo", reward, 0, 0.3 - LEVEL[reward]) for reward in REWARDS))
    other = upside_down.agreement(("dpo",))
    assert other is not None and other.value == pytest.approx(-1)
    assert upside_down.ordered(("dpo",)) == ["bad", "good"]
    assert upside_down.agreement(("grpo",)) is None
