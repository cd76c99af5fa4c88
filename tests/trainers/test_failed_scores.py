"""Runs whose reward cannot judge every image: what is learnt is what would be learnt without these images.

A rollout of three images per prompt whose third fails is one of two: its first two are the same images, since noise is
that of prompt and image.
"""

import math
from dataclasses import replace

import pytest
import torch

from rpo.objectives.endpoint.awm import Awm
from rpo.objectives.endpoint.dgpo import Dgpo
from rpo.objectives.endpoint.nft import Nft
from rpo.objectives.endpoint.par import Par
from rpo.objectives.endpoint.ram import Ram
from rpo.objectives.endpoint.rebel import Rebel
from rpo.objectives.endpoint.rvm import Rvm
from rpo.rewards import RewardError
from rpo.trainers.checks.preflight import PreflightError
from rpo.trainers.rollouts.settings import StepsConfig
from rpo.trainers.value.settings import ValueConfig
from rpo.training.log import read_metrics
from tests.marks import slow_but
from tests.run_state import metrics_of
from tests.trainers.online_runs import (  # noqa: F401
    ROLLOUT,
    TRAINERS,
    UNWATCHED,
    VALUE,
    digest,
    endpoint,
    grpo,
    learning,
    lightness,
    moved,
    score_as_action,
    small_value,
)

UNLEARNT = replace(VALUE, pretrain_rollouts=0)
TWICE = StepsConfig(passes=2)
EVERY = StepsConfig(train_steps=3)
"""All times: which of them are drawn depends on how many images there are."""
SHORT = {"estimator": "pathwise", "value": ValueConfig(sees_latents=True, updates=2, batch_size=8, pretrain_rollouts=0)}
STATE_COST = {"estimator": "likelihood_state_cost", "kl_weight": 0.5}

RUNS = {
    "grpo": (grpo, {"kl_weight": 0.1}),
    "grpo by group": (grpo, {"scale": "group"}),
    "ddpo": (grpo, {"baseline": "prompt_history"}),
    "likelihood": (score_as_action, {"value": UNLEARNT, "kl_weight": 0.5}),
    "per step": (score_as_action, {"value": UNLEARNT, "normalize": "per_step", "advantage": "value_difference"}),
    "by group": (score_as_action, {"advantage": "group", "normalize": "none"}),
    "trust region": (score_as_action, {"value": UNLEARNT, "update": "trust_region", "steps": TWICE, **STATE_COST}),
    "pathwise": (score_as_action, {**SHORT, "kl_weight": 0.1}),
    "endpoint": (endpoint, {"kl_weight": 0.1, "consistency": 0.3}),
    "endpoint by value": (endpoint, {"baseline": "value", "value": UNLEARNT}),
    "nft": (endpoint, {"objective": Nft(reference_weight=0.1)}),
    "awm": (endpoint, {"objective": Awm(clip=1e-5), "steps": EVERY}),
    "ram": (endpoint, {"objective": Ram(), "steps": EVERY}),
    "rvm": (endpoint, {"objective": Rvm(reference_weight=0.1), "steps": EVERY}),
    "par": (endpoint, {"objective": Par()}),
    "dgpo": (endpoint, {"objective": Dgpo(clip=1e-3)}),
    "rebel": (endpoint, {"objective": Rebel()}),
}


def third_of_three(images, prompts):
    """Lightness, which it cannot tell of the third of three images of a prompt."""
    values = 10 * lightness(images, prompts)
    if len(images) % 3 == 0:
        values[2::3] = math.nan
    return values


def gradient(folder, name, images_per_prompt):
    make, changes = RUNS[name]
    rollout = replace(ROLLOUT, images_per_prompt=images_per_prompt, max_failed=0.4, guidance_scale=1.0)
    trainer = moved(make(folder, reward=third_of_three, rollout=rollout, **changes))
    value = getattr(trainer.algorithm, "value", None)
    if value is not None:  # a unit that both have, since failures are in neither
        value.load_state_dict(value.state_dict() | {"mean": 4.0, "std": 0.3})
        value._reward_until = 0.0  # at x0_hat the reward knows nothing of thirds
    steps = trainer.algorithm.collect(0)
    moved(trainer)
    output = trainer.algorithm.loss(steps)
    found = torch.autograd.grad(output.loss, trainer.run.policy.parameters)
    return torch.cat([one.flatten() for one in found]), output


@pytest.mark.parametrize("name", slow_but(("grpo", "likelihood", "pathwise", "endpoint", "nft", "dgpo"), RUNS))
def test_the_gradient_is_that_of_the_images_that_were_judged(tmp_path, name):
    found, output = gradient(tmp_path / "three", name, 3)
    expected, without = gradient(tmp_path / "two", name, 2)
    assert expected.norm() > 0
    assert (found - expected).norm() < 1e-3 * expected.norm()
    facts, others = output.metrics, without.metrics
    assert facts["reward/failed"].item() == pytest.approx(1 / 3) and others["reward/failed"] == 0
    for metric in ("reward/mean", "reward/std", "value/loss", "value/explained_variance"):
        if metric in others:
            assert facts[metric].item() == pytest.approx(others[metric].item(), rel=1e-3, abs=1e-4), metric
    if RUNS[name][1].get("objective"):
        for metric in ("policy/pull", "policy/hold"):
            assert facts[metric].item() == pytest.approx(others[metric].item(), rel=1e-3, abs=1e-6), metric
    lost = output.sample_losses.view(-1, 2, 3)[..., 2]
    assert not lost.any()


SIXTEEN = replace(ROLLOUT, prompts=4, images_per_prompt=4, num_steps=2)


def sixth_of_sixteen(images, prompts):
    values = lightness(images, prompts)
    if len(images) == 16:
        values[5] = math.nan
    return values


@pytest.mark.parametrize("name", slow_but(("grpo",), TRAINERS))
def test_a_run_goes_on_without_the_images_that_fail_and_resumes_in_the_same_bits(name, tmp_path):
    def made(folder, updates):
        return TRAINERS[name](
            folder, reward=sixth_of_sixteen, rollout=SIXTEEN, learning=learning(updates, micro_batch=16)
        )

    whole = made(tmp_path / "whole", 3)
    before = digest(whole)
    whole.train()
    assert digest(whole) != before
    assert [line["reward/failed"] for line in read_metrics(tmp_path / "whole")] == pytest.approx([1 / 16] * 3)
    assert [place.name for place in (tmp_path / "whole" / "failed_reward").iterdir()] == ["sixth_of_sixteen-1"]
    made(tmp_path / "cut", 1).train()
    resumed = made(tmp_path / "cut", 3)
    resumed.train(resume=True)
    assert digest(resumed) == digest(whole)
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")


class Half:
    """Judges every second image, from its third question on."""

    def __init__(self):
        self.asked = 0

    def __call__(self, images, prompts):
        self.asked += 1
        values = lightness(images, prompts)
        if self.asked > 2:
            values[::2] = math.nan
        return values


@pytest.mark.parametrize("name", slow_but(("grpo",), ("grpo", "endpoint")))
def test_a_reward_that_fails_too_often_is_named_and_the_setting_may_be_raised_for_the_rest(name, tmp_path):
    def made(max_failed):
        rollout = replace(SIXTEEN, max_failed=max_failed)
        own = {"reward": Half(), "rollout": rollout, "monitor": UNWATCHED}
        return TRAINERS[name](tmp_path, **own, learning=learning(3, micro_batch=16))

    with pytest.raises(RewardError, match="^reward 'Half', image 0 .* and 7 more: returned nan for 8 of 16 images"):
        made(0.1).train()
    assert [line["update"] for line in read_metrics(tmp_path)] == [1]
    assert made(0.5).train(resume=True).updates == 3


def test_at_0_the_first_failure_ends_the_run(tmp_path):
    rollout = replace(SIXTEEN, max_failed=0.0)
    with pytest.raises(RewardError, match="of which rollout.max_failed lets 0 fail"):
        grpo(tmp_path, reward=sixth_of_sixteen, rollout=rollout).train()


def test_the_preflight_looks_at_the_images_that_were_judged(tmp_path):
    def often(images, prompts):
        return lightness(images, prompts).index_fill(0, torch.tensor([1, 4]), math.nan)

    lines = []
    rollout = replace(SIXTEEN, max_failed=0.25)
    checks = grpo(tmp_path, reward=often, rollout=rollout).algorithm.checks()
    lines = [str(check) for check in checks]
    assert all(check.passed for check in checks)
    assert "8 images, 2 could not be judged" in lines[0]

    def constant(images, prompts):
        return often(torch.ones_like(images), prompts)

    with pytest.raises(PreflightError, match="rewards vary within prompts"):
        grpo(tmp_path, reward=constant, rollout=rollout).train()


def lonely(images, prompts):
    values = lightness(images, prompts)
    values[[0, 1]] = math.nan
    return values


OF_THREE = replace(ROLLOUT, images_per_prompt=3, max_failed=0.4, guidance_scale=1.0)


def test_a_group_of_which_one_image_is_left_teaches_nothing(tmp_path):
    for make, changes in ((grpo, {}), (score_as_action, {"advantage": "group"}), (endpoint, {})):
        steps = make(tmp_path, reward=lonely, rollout=OF_THREE, **changes).algorithm.collect(0)
        advantage = steps["advantage"]
        assert not advantage[steps.image < 3].any()
        assert (advantage[steps.image >= 3] != 0).any()


PUBLISHED = {one.kind: one for one in (Nft(), Awm(), Ram(), Rvm(), Par(), Dgpo(), Rebel())}


@pytest.mark.parametrize("kind", slow_but(("nft", "dgpo", "rebel"), PUBLISHED))
def test_nor_does_it_teach_a_published_objective(kind, tmp_path):
    preset = PUBLISHED[kind]
    algorithm = moved(endpoint(tmp_path, reward=lonely, rollout=OF_THREE, objective=preset)).algorithm
    steps = algorithm.collect(0)
    assert torch.isfinite(steps["worth"]).all() and torch.isfinite(algorithm.loss(steps).loss)
    neutral = 0.5 if isinstance(preset, Nft) else 0.0
    assert steps["worth"][steps.image == 2].tolist() == pytest.approx([neutral] * int((steps.image == 2).sum()))
