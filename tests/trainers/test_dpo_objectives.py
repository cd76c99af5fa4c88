"""Every preference objective from the settings: by name, at its cost, resumed to the bit, refused when impossible."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import torch
from rpo.trainers.preference_config import PreferenceConfig
from rpo.trainers.region_config import RegionConfig

from rpo.config import load_config
from rpo.data.preference import PreferencePair, encode_png, pair_set
from rpo.runs.dpo import RunConfig
from rpo.trainers.dpo import DPOTrainer, loss
from rpo.trainers.dpo_config import DPOConfig
from rpo.trainers.pairs.guard import OWN_START, ChosenGuard
from rpo.training.log import TIMINGS, read_metrics
from tests.tiny import tiny_sd
from tests.trainers.test_dpo import config, toy_pairs, weights

SCORED = pair_set(
    [
        dataclasses.replace(pair, chosen_score=1.0 + 0.1 * index, rejected_score=0.05 * index)
        for index, pair in enumerate(toy_pairs())
    ]
)


def edits(count=8):
    """Noise, and the same noise with one bright patch."""
    generator, pairs = np.random.default_rng(3), []
    for index in range(count):
        source = generator.integers(0, 150, (64, 64, 3), dtype=np.uint8)
        edit = source.copy()
        edit[8:24, 8:24] += 100
        pairs.append(PreferencePair(f"prompt {index % 3}", encode_png(edit), encode_png(source), name=f"pair {index}"))
    return pair_set(pairs)


def trainer_of(folder, *, pairs=SCORED, pipe=None, objective=None, **changes):
    settings = config(folder, objective=objective or PreferenceConfig(), **changes)
    return DPOTrainer(pipe or tiny_sd(), pairs, settings)


def trained(folder, *, resume=False, watch=None, **changes):
    trainer = trainer_of(folder, **changes)
    if watch is not None:
        watch(trainer.model.pipe)
    trainer.train(resume=resume)
    return trainer


# By name, with working defaults: (overrides, what the first loss must be).

BY_NAME = {
    "link=ipo": 0.25,
    "link=hinge": 1.0,
    "link=square_hinge": 0.25,
    "link=cauchy": math.log(2),
    "link=linear": 0.0,
    "label_smoothing=0.1": math.log(2),
    "reduction=sum": math.log(2),
    "normalization=time": math.log(2),
    "normalization=weights time_weights=[0,1,1,0.5]": math.log(2),
    "margin=0.5": math.log(1 + math.exp(0.5)),
    "margin_from=time": math.log(1 + math.exp(1.0)),
    "margin_from=rewards": None,
    "margin=0.4 margin_mixed=true reference_weight=0.25": None,
    "reference_weight=0 margin=0.5": None,
    "context=scores": math.log(2),
    "context=reference": math.log(2),
    "winner_preserving=0.9": math.log(2),
    "method=kto": 0.5,
    "method=mapo": None,
}


@pytest.mark.parametrize("words", BY_NAME)
def test_each_component_trains_from_the_command_line(tmp_path, words):
    overrides = [f"dpo.objective.{word}" for word in words.split()]
    objective = load_config(RunConfig, None, overrides).dpo.objective
    trainer = trained(tmp_path, objective=objective, updates=2)
    first, second = read_metrics(tmp_path)
    if BY_NAME[words] is not None:
        assert first["dpo/loss"] == pytest.approx(BY_NAME[words], abs=1e-5)
    assert second["dpo/loss"] != first["dpo/loss"]
    assert all(word.split("=")[0] in trainer.plan() for word in words.split() if word != "method=kto")


def test_plain_settings_are_plain_dpo(tmp_path):
    trainer = trainer_of(tmp_path)
    batch = trainer.batches.at(range(4))
    ours = trainer._loss()(batch)
    plain = loss(batch, policy=trainer.policy, beta=trainer.beta, sft_weight=0.0)
    assert torch.equal(ours.sample_losses, plain.sample_losses)
    assert list(ours.metrics) == list(plain.metrics)
    assert trainer._loss().moments is None
    assert not [key for key in trainer.identity if key.startswith(("objective", "region"))]


@pytest.mark.slow
def test_a_sum_over_dimensions_with_beta_per_dimension_is_the_mean(tmp_path):
    mean = trained(tmp_path / "mean")
    summed = trained(tmp_path / "sum", objective=PreferenceConfig(reduction="sum"))
    assert summed.beta == pytest.approx(mean.beta / 256)
    torch.testing.assert_close(weights(summed), weights(mean), rtol=0, atol=1e-5)


# What an update costs.


def counting(calls):
    return lambda pipe: pipe.unet.register_forward_pre_hook(lambda *_: calls.update(forwards=1))


@pytest.mark.parametrize(
    ("objective", "forwards"),
    [
        (PreferenceConfig(), 2),
        (PreferenceConfig(reference_weight=0.0, margin=0.5), 1),
        (PreferenceConfig(reference_weight=0.0, normalization="time"), 1),
        (PreferenceConfig(method="mapo"), 1),
        (PreferenceConfig(method="kto"), 2),
        (PreferenceConfig(winner_preserving=0.9, margin_from="time"), 2),
    ],
)
def test_the_reference_is_asked_only_where_it_counts(tmp_path, objective, forwards):
    calls = Counter()
    trained(tmp_path, watch=counting(calls), objective=objective)
    assert calls["forwards"] == 3 * forwards


def test_the_context_is_measured_once_and_kept(tmp_path):
    calls, objective, cache = Counter(), PreferenceConfig(context="reference"), str(tmp_path / "cache")
    for name, before in (("one", 2), ("two", 0)):  # 8 pairs in micro-batches of 4, then none
        calls.clear()
        trained(tmp_path / name, watch=counting(calls), objective=objective, cache_folder=cache)
        assert calls["forwards"] == before + 6


def test_the_context_is_the_error_of_the_reference_at_mid_time(tmp_path):
    trainer = trainer_of(tmp_path, objective=PreferenceConfig(context="reference"))
    batch = trainer.batches.midway(range(8))
    assert (batch.timestep == 500).all()
    assert torch.equal(batch.x_0, trainer.batches.midway(range(8)).x_0)
    scale = trainer._loss().facts.context_scale
    assert scale.mean().item() == pytest.approx(1)
    assert scale[0] == scale[3] == scale[6] != scale[1]  # one number per prompt


# A run's life.


@pytest.mark.parametrize(
    "objective",
    [
        PreferenceConfig(normalization="time"),
        PreferenceConfig(margin_from="time", reference_weight=0.0),
        PreferenceConfig(method="kto"),
    ],
)
def test_running_moments_resume_to_the_bit(tmp_path, objective):
    undisturbed = trained(tmp_path / "one", objective=objective)
    trained(tmp_path / "two", objective=objective, updates=2)
    resumed = trained(tmp_path / "two", objective=objective, resume=True)
    assert torch.equal(weights(resumed), weights(undisturbed))
    ours, theirs = (
        [{name: value for name, value in line.items() if name not in TIMINGS} for line in read_metrics(tmp_path / name)]
        for name in ("one", "two")
    )
    assert ours == theirs


@pytest.mark.slow
def test_moments_do_not_depend_on_how_an_update_is_split(tmp_path):
    loops = {"loop": dataclasses.replace(config(tmp_path).loop, adam_eps=1e-3)}
    whole = trained(tmp_path / "whole", objective=PreferenceConfig(normalization="time", margin=0.2), **loops)
    parts = trained(
        tmp_path / "parts", objective=PreferenceConfig(normalization="time", margin=0.2), micro_batch=1, **loops
    )
    torch.testing.assert_close(weights(parts), weights(whole), rtol=0, atol=1e-5)


def test_resuming_with_another_objective_is_refused(tmp_path):
    trained(tmp_path, updates=1)
    with pytest.raises(ValueError, match=r"what it is made of changed .objective\.link from None to ipo"):
        trained(tmp_path, updates=2, resume=True, objective=PreferenceConfig(link="ipo"))


def test_the_guard_holds_a_run_without_reference_against_its_own_start():
    guard = ChosenGuard(1.5, starts_at_zero=False)
    calm, broken = ({"dpo/margin": 3.0, "dpo/chosen_error": error} for error in (0.5, 1.5))
    assert [guard(calm) for _ in range(OWN_START)] == [None] * OWN_START
    resumed = ChosenGuard(1.5, starts_at_zero=False)
    resumed.load_state_dict(guard.state_dict())
    answers = [resumed(broken) for _ in range(4)]
    assert answers[:2] == [None, None]  # 1 + 2 (1 - 0.9^n) passes 1.5 at n = 3
    assert "has risen to 1.54 times that of the first updates (limit 1.5)" in answers[2]


# Regions.

REGION = RegionConfig(is_on=True)


def test_the_region_of_an_edit_is_where_it_was_made(tmp_path):
    trainer = trainer_of(tmp_path, pairs=edits(), region=RegionConfig(is_on=True, soften=0, anchor=0.0))
    mask = trainer._loss()._mask(trainer.batches.at(range(4)))
    expected = torch.full((8, 1, 8, 8), 0.1)
    expected[:, :, 1:3, 1:3] = 1
    torch.testing.assert_close(mask, expected)


def test_a_full_mask_is_plain_dpo_to_the_bit(tmp_path):
    plain = trained(tmp_path / "plain", pairs=edits())
    full = RegionConfig(is_on=True, floor=1.0, anchor=0.0)
    assert torch.equal(weights(trained(tmp_path / "full", pairs=edits(), region=full)), weights(plain))


@pytest.mark.slow
def test_the_anchor_holds_the_rest_and_starts_at_zero(tmp_path):
    loose, held = (
        trained(tmp_path / str(anchor), pairs=edits(), updates=8, region=RegionConfig(is_on=True, anchor=anchor))
        for anchor in (1e-9, 30.0)
    )
    moved = [read_metrics(tmp_path / str(anchor)) for anchor in (1e-9, 30.0)]
    assert moved[0][0]["dpo/anchor"] == moved[1][0]["dpo/anchor"] == 0
    assert moved[1][-1]["dpo/anchor"] < 0.5 * moved[0][-1]["dpo/anchor"]
    assert not torch.equal(weights(loose), weights(held))


def test_no_image_is_decoded_twice(tmp_path, monkeypatch):
    decoded, decode = Counter(), PreferencePair.decode
    monkeypatch.setattr(PreferencePair, "decode", lambda *args: decoded.update([args]) or decode(*args))
    ahead = trainer_of(tmp_path, pairs=edits(), region=REGION)
    ahead.batches.fill_caches(4, progress=False)
    ahead.batches.at(range(16))
    assert len(decoded) == 16
    assert set(decoded.values()) == {1}
    decoded.clear()
    trainer_of(tmp_path / "lazy", pairs=edits(), region=REGION).batches.at(range(16))
    assert set(decoded.values()) == {1}


@pytest.mark.slow
def test_kept_reference_errors_know_the_region(tmp_path):
    cache, without = str(tmp_path / "cache"), RegionConfig(is_on=True, anchor=0.0)
    trained(tmp_path / "plain", pairs=edits(), draws_per_pair=1, cache_folder=cache)
    region = trained(tmp_path / "region", pairs=edits(), draws_per_pair=1, cache_folder=cache, region=without)
    assert region._reference_errors.computed > 0
    assert read_metrics(tmp_path / "region")[0]["dpo/margin"] == pytest.approx(0, abs=1e-4)


# What is refused, each with one clear error.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 0.5}, "'label_smoothing' to 0.5, but a number"),
        ({"time_bins": 0}, "'time_bins' to 0, but a whole number"),
        ({"normalization": "weights"}, "weights come with normalization: weights"),
        ({"time_weights": (1.0,)}, "weights come with normalization: weights"),
        ({"normalization": "weights", "time_weights": (0.0, 0.0)}, "one of them must be above 0"),
        (
            {"normalization": "weights", "time_weights": (1.0, -1.0)},
            r"'time_weights\[1\]' to -1.0, but a number",
        ),
        ({"margin": -0.1}, "'margin' to -0.1, but a number"),
        ({"margin_from": "rewards", "margin": 0.0}, "margin_from is rewards and margin 0, which does nothing"),
        ({"normalization": "time", "margin_from": "time"}, "one scale at every time already"),
        ({"margin": 1.0, "margin_mixed": True}, "the margin 1 - reference_weight = 0 times"),
        ({"reference_weight": 1.5}, "'reference_weight' to 1.5, but a number"),
        ({"winner_preserving": 2.0}, "'winner_preserving' to 2.0, but a number"),
        ({"method": "kto", "link": "ipo"}, "objective.link is ipo, but method kto has no such part"),
        ({"method": "mapo", "reference_weight": 0.0}, "reference_weight is 0.0, but method mapo has no such part"),
        ({"method": "mapo", "reduction": "sum"}, "the odds of mapo are defined for errors averaged"),
        ({"desirable_weight": 2.0}, "desirable_weight is 2.0, but method dpo has no such part"),
        ({"method": "mapo", "mapo_slope": 0.0}, "'mapo_slope' to 0.0, but a number"),
        ({"method": "kto", "undesirable_weight": -1.0}, "'undesirable_weight' to -1.0, but a number"),
    ],
)
def test_impossible_objectives_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PreferenceConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"floor": 1.1}, "'floor' to 1.1, but a number"),
        ({"full_at": 0.0}, "'full_at' to 0.0, but a number"),
        ({"soften": -1}, "'soften' to -1, but a whole number"),
        ({"anchor": -1.0}, "'anchor' to -1.0, but a number"),
    ],
)
def test_impossible_regions_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RegionConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"sft_weight": 0.1, "objective": PreferenceConfig(method="kto")},
            "sft_weight is 0.1, but objective.method kto",
        ),
        ({"region": REGION, "objective": PreferenceConfig(reference_weight=0.0)}, "needs no reference, and the anchor"),
        ({"region": REGION, "draws_per_pair": 4}, "the anchor needs its predictions"),
    ],
)
def test_settings_that_cannot_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DPOConfig(**settings)


@pytest.mark.parametrize("settings", [{"margin_from": "rewards"}, {"context": "scores"}])
def test_a_set_without_scores_is_refused_where_they_are_needed(tmp_path, settings):
    with pytest.raises(ValueError, match=r"pair 0 \(and 7 more of 8\) has no chosen_score and rejected_score"):
        trainer_of(tmp_path, pairs=toy_pairs(), objective=PreferenceConfig(**settings))


def test_a_misspelt_link_names_those_there_are():
    with pytest.raises(ValueError, match=r"sets 'dpo.objective.link' to 'cauchi', but one of sigmoid, ipo, hinge"):
        load_config(RunConfig, None, ["dpo.objective.link=cauchi"])
