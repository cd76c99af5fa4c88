"""Rewards that count for some images only, and what part each has in what images are worth."""

import math
from dataclasses import replace

import pytest
import torch

from rpo.errors import InputError
from rpo.objectives.advantages import group_normalize
from rpo.objectives.endpoint.nft import Nft
from rpo.rewards import load_rewards
from rpo.trainers.rollouts.gates import Gate, counted, read_gates
from rpo.training.log import read_metrics
from tests.marks import slow_but
from tests.trainers.online_runs import ROLLOUT, UNWATCHED, endpoint, grpo, learning, reward_gradient, score_as_action

CORNER, CONTRAST = f"{__name__}:corner", f"{__name__}:contrast"
BOTH = {CORNER: 3.0, CONTRAST: 1.0}
NAN = math.nan


def corner(images, prompts):
    return images[:, 0, 0, 0]


def contrast(images, prompts):
    return 100 * images.std(dim=(1, 2, 3))


def test_a_gate_is_a_name_and_a_number():
    names = ("ocr", "hps-v2.1", "http:ocr", "mine:Words")
    given = {"hps-v2.1": "ocr > 0.9", "ocr": "mine:Words > -1e-2", "mine:Words": "http://host:80/ocr?batch=2 > 0"}
    assert read_gates(given, names) == {
        "hps-v2.1": Gate("ocr", 0.9),
        "ocr": Gate("mine:Words", -0.01),
        "mine:Words": Gate("http:ocr", 0.0),
    }


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"hps-v2": "ocr>0.9"}, "NAME > NUMBER"),
        ({"hps-v2": "ocr >= 0.9"}, "NAME > NUMBER"),
        ({"hps-v2": "ocr > 0.9 and shapes > 1"}, "NAME > NUMBER"),
        ({"hps-v2": "ocr > many"}, "NAME > NUMBER"),
        ({"hps-v2": "ocr > nan"}, "NAME > NUMBER"),
        ({"hps-v2": "ocr"}, "NAME > NUMBER"),
        ({"hps-v2": "orc > 0.9"}, "no reward 'orc'.*nearest is 'ocr'"),
        ({"hps-v2.1": "ocr > 0.9"}, "no reward 'hps-v2.1'.*nearest is 'hps-v2'"),
        ({"ocr": "ocr > 0.9"}, "itself"),
    ],
)
def test_others_are_refused(given, told):
    with pytest.raises(InputError, match=told):
        read_gates(given, ("ocr", "hps-v2"))


def test_what_counts_is_strictly_above_and_a_failed_score_opens_nothing():
    parts = {"a": torch.tensor([0.5, 0.6, NAN, 0.7]), "b": torch.tensor([1.0, 2.0, 3.0, NAN])}
    found = counted(parts, {"b": Gate("a", 0.5)})
    assert found["a"] is parts["a"]
    assert found["b"][1] == 2 and found["b"].isnan().tolist() == [True, False, True, True]


def rollout_of(make, folder, gates, **changes):
    trainer = make(folder, reward=BOTH, gates=gates, **changes)
    return trainer, trainer.algorithm.collector.draw(0)


def middle(parts, group):
    """A number that some images of a group are above."""
    first = parts[CORNER][group == 0]
    return ((first.min() + first.max()) / 2).item()


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_the_others_are_compared_among_those_that_pass(tmp_path, scale):
    _, plain = rollout_of(grpo, tmp_path / "plain", {}, scale=scale)
    gate = middle(plain.parts, plain.group)
    trainer, rollout = rollout_of(grpo, tmp_path / "gated", {CONTRAST: f"{CORNER} > {gate:.9g}"}, scale=scale)
    passes = rollout.parts[CORNER] > gate
    assert 0 < passes.sum() < len(passes)
    assert torch.equal(rollout.parts[CONTRAST], plain.parts[CONTRAST])  # as it was scored
    by_corner = group_normalize(rollout.parts[CORNER], rollout.group, scale=scale)
    by_contrast = group_normalize(rollout.parts[CONTRAST].masked_fill(~passes, NAN), rollout.group, scale=scale)
    assert not by_contrast[~passes].any()
    found = trainer.algorithm.advantages(rollout)
    assert torch.allclose(found, (3 * by_corner + by_contrast) / 4, atol=1e-5)


def test_where_none_passes_the_reward_says_nothing(tmp_path):
    trainer, rollout = rollout_of(grpo, tmp_path, {CONTRAST: f"{CORNER} > 2"})
    expected = 0.75 * group_normalize(rollout.parts[CORNER], rollout.group, scale="batch")
    assert torch.allclose(trainer.algorithm.advantages(rollout), expected, atol=1e-6)


def test_prompts_remember_only_what_counted(tmp_path):
    trainer, rollout = rollout_of(grpo, tmp_path, {CONTRAST: f"{CORNER} > 2"}, baseline="prompt_history")
    trainer.algorithm.advantages(rollout)
    histories = trainer.algorithm.histories
    assert not histories[CONTRAST].state_dict() and histories[CORNER].state_dict()


@pytest.mark.parametrize("make", [score_as_action, endpoint, reward_gradient])
def test_where_raw_scores_are_summed_there_is_no_gate(make, tmp_path):
    with pytest.raises(InputError, match="gates.*rpo train grpo"):
        make(tmp_path, reward=BOTH, gates={CONTRAST: f"{CORNER} > 0"}).algorithm.plan()


@pytest.mark.parametrize(
    "make", slow_but((score_as_action, reward_gradient), (grpo, score_as_action, endpoint, reward_gradient, "nft"))
)
def test_shares_are_logged_and_sum_to_one(make, tmp_path):
    changes = {"objective": Nft(), "gates": {CONTRAST: f"{CORNER} > 0"}} if make == "nft" else {}
    trainer = (endpoint if make == "nft" else make)(tmp_path, reward=BOTH, learning=learning(1), **changes)
    trainer.train()
    (line,) = read_metrics(trainer.folder)
    shares = [line[f"reward/{name}/share"] for name in BOTH]
    assert sum(shares) == pytest.approx(1, abs=1e-4) and shares[0] != shares[1]
    assert (f"reward/{CONTRAST}/counted" in line) == bool(changes)


def test_the_share_of_raw_scores_is_that_of_their_weighted_differences(tmp_path):
    trainer, rollout = rollout_of(score_as_action, tmp_path, {})
    facts = trainer.algorithm.collector.facts(rollout)
    centred = {
        name: BOTH[name] * group_normalize(part, rollout.group, scale="none") for name, part in rollout.parts.items()
    }
    total = sum(centred.values())
    for name, one in centred.items():
        assert facts[f"reward/{name}/share"].item() == pytest.approx((one @ total / (total @ total)).item(), rel=1e-4)


def test_one_reward_has_no_share(tmp_path):
    trainer = grpo(tmp_path, reward=CORNER)
    facts = trainer.algorithm.collector.facts(trainer.algorithm.collector.draw(0))
    assert not [name for name in facts if name.endswith("/share")]


class Leaves:
    """A reward that notes what happens to it."""

    def __init__(self):
        self.log = []

    def __call__(self, images, prompts):
        self.log.append(len(images))
        return images.mean((1, 2, 3))

    def leave(self):
        self.log.append("left")


@pytest.mark.parametrize("leaves", [True, False])
def test_rewards_are_asked_in_batches_and_leave_after_each_rollout(leaves, tmp_path):
    reward = Leaves()
    rollout = replace(ROLLOUT, images_per_prompt=3, reward_batch_size=4, rewards_leave=leaves)
    grpo(tmp_path, reward=reward, rollout=rollout, preflight=False, learning=learning(2), monitor=UNWATCHED).train()
    assert reward.log == ([4, 2, "left"] if leaves else [4, 2]) * 2


def test_batches_change_no_score_info_or_failure():
    def counting(images, prompts):
        values = images.mean((1, 2, 3))
        values[images[:, 0, 0, 0] > 0.5] = NAN
        return values, {"level": 2 * values, "failure": ["light" if one.isnan() else None for one in values]}

    images, prompts = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(1)), ["a"] * 12
    rewards = load_rewards(counting)
    (whole,) = rewards.ask(images, prompts, may_fail=True).values()
    (parts,) = rewards.ask(images, prompts, may_fail=True, batch_size=5).values()
    assert torch.equal(whole.values.nan_to_num(-1), parts.values.nan_to_num(-1))
    assert whole.failures == parts.failures and len(whole.failures) > 1
    assert parts.info == pytest.approx(whole.info)
