"""Every preference objective from the settings: by name, at its cost, resumed to the bit, refused when impossible."""

import math
from collections import Counter

import pytest
import torch

from rpo.config.load import load_config
from rpo.data.preference import PreferencePair
from rpo.objectives.preference.dpo import Dpo
from rpo.objectives.preference.kto import Kto
from rpo.objectives.preference.mapo import Mapo
from rpo.objectives.preference.region import RegionConfig
from rpo.trainers.dpo_config import DPOConfig
from rpo.training.log import TIMINGS, read_metrics
from tests.marks import slow_but
from tests.trainers import pair_runs
from tests.trainers.pair_runs import SCORED, counting, edits, steady, toy_pairs, weights


def trainer_of(folder, *, pairs=SCORED, **changes):
    return pair_runs.trainer_of(folder, pairs=pairs, **changes)


def trained(folder, *, pairs=SCORED, **changes):
    return pair_runs.trained(folder, pairs=pairs, **changes)


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
    "kind=kto": 0.5,
    "kind=mapo": None,
}


QUICK = ("link=ipo", "normalization=time", "margin_from=rewards", "context=scores", "kind=kto", "kind=mapo")


@pytest.mark.parametrize("words", slow_but(QUICK, BY_NAME))
def test_each_component_trains_from_the_command_line(tmp_path, words):
    objective = load_config(DPOConfig, None, [f"objective.{word}" for word in words.split()]).objective
    trained(tmp_path, objective=objective, updates=2)
    first, second = read_metrics(tmp_path)
    if BY_NAME[words] is not None:
        assert first["dpo/loss"] == pytest.approx(BY_NAME[words], abs=1e-5)
    assert second["dpo/loss"] != first["dpo/loss"]


@pytest.mark.slow
def test_a_sum_over_dimensions_with_beta_per_dimension_is_the_mean(tmp_path):
    mean = trained(tmp_path / "mean")
    summed = trained(tmp_path / "sum", objective=Dpo(reduction="sum"))
    assert summed.algorithm.beta == pytest.approx(mean.algorithm.beta / 256)
    torch.testing.assert_close(weights(summed), weights(mean), rtol=0, atol=1e-5)


# What an update costs.


@pytest.mark.parametrize(
    ("objective", "forwards"),
    [
        (Dpo(), 2),
        pytest.param(Dpo(reference_weight=0.0, margin=0.5), 1, marks=pytest.mark.slow),
        (Dpo(reference_weight=0.0, normalization="time"), 1),
        (Mapo(), 1),
        (Kto(), 2),
        pytest.param(Dpo(winner_preserving=0.9, margin_from="time"), 2, marks=pytest.mark.slow),
    ],
)
def test_the_reference_is_asked_only_where_it_counts(tmp_path, objective, forwards):
    calls = Counter()
    trained(tmp_path, watch=counting(calls), objective=objective)
    assert calls["forwards"] == 3 * forwards


def test_the_context_is_measured_once_and_kept(tmp_path):
    calls, objective, cache = Counter(), Dpo(context="reference"), str(tmp_path / "cache")
    for name, before in (("one", 2), ("two", 0)):  # 8 pairs in micro-batches of 4, then none
        calls.clear()
        trained(tmp_path / name, watch=counting(calls), objective=objective, cache_folder=cache)
        assert calls["forwards"] == before + 6


def test_the_context_is_the_error_of_the_reference_at_mid_time(tmp_path):
    trainer = trainer_of(tmp_path, objective=Dpo(context="reference"))
    data = trainer.algorithm.data
    batch = data.midway(range(8))
    assert (batch.timestep == 500).all()
    assert torch.equal(batch.x_0, data.midway(range(8)).x_0)
    trainer.algorithm.prepare()
    scale = trainer.algorithm.facts.context_scale
    assert scale.mean().item() == pytest.approx(1)
    assert scale[0] == scale[3] == scale[6] != scale[1]  # one number per prompt


# A run's life.


@pytest.mark.parametrize(
    "objective",
    [
        Dpo(normalization="time"),
        pytest.param(Dpo(margin_from="time", reference_weight=0.0), marks=pytest.mark.slow),
        Kto(),
    ],
)
def test_running_statistics_resume_to_the_bit(tmp_path, objective):
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
def test_statistics_do_not_depend_on_how_an_update_is_split(tmp_path):
    whole, parts = (
        steady(
            trainer_of(
                tmp_path / str(size), objective=Dpo(normalization="time", margin=0.2), learning={"micro_batch": size}
            )
        )
        for size in (4, 1)
    )
    whole.train()
    parts.train()
    torch.testing.assert_close(weights(parts), weights(whole), rtol=0, atol=1e-5)


def test_resuming_with_another_objective_is_refused(tmp_path):
    trained(tmp_path, updates=1)
    with pytest.raises(ValueError, match=r"objective\.link from sigmoid to ipo"):
        trained(tmp_path, updates=2, resume=True, objective=Dpo(link="ipo"))


# Regions.

REGION = RegionConfig()


def test_the_region_of_an_edit_is_where_it_was_made(tmp_path):
    trainer = trainer_of(tmp_path, pairs=edits(), region=RegionConfig(soften=0, anchor=0.0))
    mask = trainer.run.config.region.mask(trainer.algorithm.data.at(range(4)).difference)
    expected = torch.full((4, 1, 8, 8), 0.1)
    expected[:, :, 1:3, 1:3] = 1
    torch.testing.assert_close(mask, expected)


def test_a_full_mask_is_plain_dpo_to_the_bit(tmp_path):
    plain = trained(tmp_path / "plain", pairs=edits())
    full = RegionConfig(floor=1.0, anchor=0.0)
    assert torch.equal(weights(trained(tmp_path / "full", pairs=edits(), region=full)), weights(plain))


@pytest.mark.slow
def test_the_anchor_holds_the_rest_and_starts_at_zero(tmp_path):
    loose, held = (
        trained(tmp_path / str(anchor), pairs=edits(), updates=8, region=RegionConfig(anchor=anchor))
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
    ahead.algorithm.data.fill_caches(4, progress=False)
    ahead.algorithm.data.at(range(16))
    assert len(decoded) == 16
    assert set(decoded.values()) == {1}
    decoded.clear()
    trainer_of(tmp_path / "lazy", pairs=edits(), region=REGION).algorithm.data.at(range(16))
    assert set(decoded.values()) == {1}


def test_kept_reference_errors_know_the_region(tmp_path):
    calls, kept = (
        Counter(),
        {"pairs": edits(), "draws_per_pair": 1, "cache_folder": str(tmp_path / "cache"), "updates": 2},
    )
    trained(tmp_path / "plain", **kept)
    trained(tmp_path / "region", watch=counting(calls), region=RegionConfig(anchor=0.0), **kept)
    assert calls["forwards"] == 4
    assert read_metrics(tmp_path / "region")[0]["dpo/margin"] == pytest.approx(0, abs=1e-4)


# What is refused, each with one clear error.


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
        ({"region": REGION, "objective": Dpo(reference_weight=0.0)}, "needs no reference, and the anchor"),
        ({"region": REGION, "draws_per_pair": 4}, "the anchor needs its predictions"),
    ],
)
def test_settings_that_cannot_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DPOConfig(**settings)


@pytest.mark.parametrize("settings", [{"margin_from": "rewards"}, {"context": "scores"}])
def test_a_set_without_scores_is_refused_where_they_are_needed(tmp_path, settings):
    with pytest.raises(ValueError, match=r"pair 0 \(and 7 more of 8\) has no chosen_score and rejected_score"):
        trainer_of(tmp_path, pairs=toy_pairs(), objective=Dpo(**settings))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("objective.link=cauchi", r"'objective.link' to 'cauchi', but one of sigmoid, ipo, hinge"),
        ("objective.kind=kpo", "dpo.*kto.*mapo"),
        ("objective.kind=mapo objective.link=ipo", "'objective.link'"),
        ("objective.kind=kto objective.sft_weight=1", "'objective.sft_weight'"),
    ],
)
def test_what_an_objective_does_not_have_is_refused(word, message):
    with pytest.raises(ValueError, match=message):
        load_config(DPOConfig, None, word.split())
