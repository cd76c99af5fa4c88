"""Two processes make the online updates of one: advantages, histories, V, noise and what is logged are those of all."""

import json
import os
import random
from dataclasses import replace

import pytest
import torch

from rpo.rewards import RewardError
from rpo.trainers.rollouts.settings import StepsConfig
from rpo.training.log import TIMINGS, read_metrics
from rpo.training.processes import Processes
from tests.forked import by_torchrun
from tests.trainers.online_runs import ROLLOUT, endpoint, grpo, learning, score_as_action
from tests.trainers.pair_runs import steady, weights

pytestmark = pytest.mark.slow

SCRIPT = """
import sys
from pathlib import Path
from rpo.training.processes import Processes

Processes()  # joins the other process; what is imported from here on finds a group
from tests.trainers.test_online_processes import in_each_process

in_each_process(Path(sys.argv[1]))
"""
LEARNING = learning(4, micro_batch=2)
SOME = StepsConfig(train_steps=1, minibatches=2)
"""One of two steps of each image, in two updates a rollout: most that is drawn is drawn apart from the images."""


def corner(images, prompts):
    """A pixel, which images differ in far more than by rounding."""
    return images[:, 0, 0, 0]


def contrast(images, prompts):
    return 10 * images.std(dim=(1, 2, 3))


def drawn():
    """The main process alone asks for it."""
    assert os.environ.get("RANK", "0") == "0"
    number = random.randrange(1000)
    return f"{number} cats", {"number": number}


def told(images, prompts, metadata):
    assert [f"{one['number']} cats" for one in metadata] == list(prompts)
    return corner(images, prompts), {"number": [one["number"] / 1000 for one in metadata]}


def half_of_dogs(images, prompts):
    """The second image of one of the prompts is not judged: by one of two processes, in two of three rollouts."""
    values = corner(images, prompts)
    values[[row for row, prompt in enumerate(prompts) if prompt == "two dogs" and row % 2]] = torch.nan
    return values


HALF = {"reward": half_of_dogs, "rollout": replace(ROLLOUT, max_failed=0.3)}
TWO_REWARDS = {f"{__name__}:corner": 1.0, f"{__name__}:contrast": 0.5}
RUNS = {
    "grpo": (grpo, {"reward": TWO_REWARDS, "steps": SOME, "clip": 0.1}),
    "source": (grpo, {"reward": told, "prompts": drawn}),
    "ddpo": (grpo, {"baseline": "prompt_history", "history": 6, "kl_weight": 0.01}),
    "likelihood": (score_as_action, {"advantage": "return_minus_value", "kl_weight": 0.01}),
    "endpoint": (endpoint, {"baseline": "value", "kl_weight": 0.01, "steps": replace(SOME, minibatches=1)}),
    "failed": (grpo, {"baseline": "prompt_history", "history": 6, "kl_weight": 0.01, **HALF}),
    "failed value": (score_as_action, {"advantage": "return_minus_value", **HALF}),
}
TOO_OFTEN = (grpo, {"reward": half_of_dogs, "rollout": replace(ROLLOUT, max_failed=0.2)})


def trained(root, name):
    return trained_by(root, *RUNS[name])


def trained_by(root, make, changes):
    trainer = steady(make(root, **{"reward": corner, "learning": LEARNING, "preflight": False} | changes))
    start = weights(trainer)
    trainer.train()
    return start, weights(trainer)


def in_each_process(root):
    torch.set_num_threads(1)
    here = Processes()
    seen = {name: trained(root / "two" / name, name)[1].tolist() for name in RUNS}
    with pytest.raises(RewardError) as caught:
        trained_by(root / "two" / "too often", *TOO_OFTEN)
    (root / f"seen-{here.index}.json").write_text(json.dumps({**seen, "error": str(caught.value)}))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    by_torchrun("-c", SCRIPT, str(root), limit=300)
    return root, [json.loads((root / f"seen-{index}.json").read_text()) for index in range(2)]


def test_a_reward_that_fails_too_often_ends_all_processes_and_one_has_its_images(two):
    root, seen = two
    errors = [process["error"] for process in seen]
    assert all("half_of_dogs'" in one and "returned nan for 1 of 4 images" in one for one in errors)
    assert sum("The images are those of another process" in one for one in errors) == 1
    kept = (root / "two" / "too often" / "failed_reward").glob("*/fault.json")  # of what is watched, too
    assert sum("rollout.max_failed" in json.loads(one.read_text())["problem"] for one in kept) == 1


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_make_the_updates_of_one(two, tmp_path, name):
    root, seen = two
    ours, theirs = (torch.tensor(process[name]) for process in seen)
    assert torch.equal(ours, theirs)
    start, alone = trained(tmp_path, name)
    assert (alone - start).abs().max() > 1e-2
    torch.testing.assert_close(ours, alone, rtol=0, atol=5e-5)
    for line, expected in zip(read_metrics(root / "two" / name), read_metrics(tmp_path), strict=True):
        for metric in expected.keys() - set(TIMINGS):
            # The loss is a sum of large terms of both signs, and so is the KL by which two bounds differ. A metric
            # that is nowhere defined is null in both.
            rounding = 1e-3 if metric == "loop/loss" else 1e-5
            if metric == "policy/kl":
                rounding = max(rounding, 1e-5 * expected.get("policy/bound", 0.0))
            if expected[metric] is None:
                assert line[metric] is None, metric
            else:
                assert line[metric] == pytest.approx(expected[metric], rel=1e-3, abs=rounding), metric
