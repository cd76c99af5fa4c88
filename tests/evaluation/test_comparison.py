import re

import numpy as np
import pytest

from rpo.evaluation.comparison import (
    OUTCOMES,
    Interval,
    accuracy,
    accuracy_by,
    compare,
    compare_by,
    draw_examples,
    format_gain,
    format_share,
    outcomes,
    paired_gain,
)


def clustered(rng, *, prompts, images, mean, concentration):
    """Booleans whose share differs from prompt to prompt: beta-binomial, the shape real evaluations have."""
    shares = rng.beta(mean * concentration, (1 - mean) * concentration, size=prompts)
    holds = rng.random((prompts, images)) < shares[:, None]
    return holds.ravel(), np.repeat(np.arange(prompts), images).tolist()


# accuracy


def test_wilson_agrees_with_scipy():
    from scipy.stats import binomtest

    for successes, count in [(0, 7), (1, 7), (25, 50), (199, 200), (40, 40)]:
        ours = accuracy(np.arange(count) < successes)
        theirs = binomtest(successes, count).proportion_ci(confidence_level=0.95, method="wilson")
        assert ours.value == successes / count
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_ends_exactly_at_zero_and_one_but_never_without_width():
    none, every = accuracy([False] * 30), accuracy([True] * 30)
    assert (none.value, none.low) == (0.0, 0.0) and 0 < none.high < 0.2
    assert (every.value, every.high) == (1.0, 1.0) and 0.8 < every.low < 1
    assert none.high == pytest.approx(1 - every.low)


def test_with_one_image_of_each_prompt_it_is_plain_wilson():
    holds = np.random.default_rng(0).random(400) < 0.6
    plain, grouped = accuracy(holds), accuracy(holds, groups=range(400))
    assert (grouped.low, grouped.high) == pytest.approx((plain.low, plain.high), abs=5e-4)


def test_prompts_whose_images_balance_each_other_add_none_either():
    balanced = [True, False] * 30
    assert accuracy(balanced, groups=[i // 2 for i in range(60)]).high >= accuracy(balanced).high


def test_copies_of_one_image_add_no_precision():
    holds = np.random.default_rng(1).random(60) < 0.4
    single = accuracy(holds, groups=range(60))
    copied = accuracy(np.repeat(holds, 8), groups=np.repeat(np.arange(60), 8).tolist())
    assert (copied.low, copied.high) == pytest.approx((single.low, single.high), abs=1e-9)
    everything = accuracy(np.ones(80, dtype=bool), groups=[i // 8 for i in range(80)])
    assert everything == accuracy([True] * 10)


@pytest.mark.parametrize("mean", [0.15, 0.5])
def test_accuracy_interval_covers_the_truth_when_images_of_a_prompt_are_alike(mean):
    rng = np.random.default_rng(2)
    grouped_hits, plain_hits, trials = 0, 0, 1500
    for _ in range(trials):
        holds, groups = clustered(rng, prompts=60, images=6, mean=mean, concentration=1.5)
        grouped, plain = accuracy(holds, groups=groups), accuracy(holds)
        grouped_hits += grouped.low <= mean <= grouped.high
        plain_hits += plain.low <= mean <= plain.high
    assert 0.925 <= grouped_hits / trials <= 0.975
    assert plain_hits / trials < 0.80  # what ignoring the prompts would have claimed to be 95 %


# paired gain


def test_nothing_changed_is_exactly_zero_and_everything_fixed_exactly_one():
    holds = np.random.default_rng(3).random(50) < 0.5
    groups = [i // 5 for i in range(50)]
    assert paired_gain(holds, holds, groups=groups, seed=0) == Interval(0.0, 0.0, 0.0)
    assert paired_gain([False] * 50, [True] * 50, groups=groups, seed=0) == Interval(1.0, 1.0, 1.0)


def test_gain_is_the_mean_difference_per_image_with_prompts_of_unequal_size():
    before = [0.0, 0.0, 0.0, 0.0]
    after = [1.0, 0.0, 0.0, 0.0]
    assert paired_gain(before, after, groups=["a", "b", "b", "b"], seed=0).value == 0.25


def test_gain_takes_scores_and_a_shift_moves_the_interval_rigidly():
    rng = np.random.default_rng(4)
    before, after = rng.random(90), rng.random(90)
    groups = [i // 3 for i in range(90)]
    plain = paired_gain(before, after, groups=groups, seed=7)
    shifted = paired_gain(before, after + 0.25, groups=groups, seed=7)
    assert plain.value == pytest.approx((after - before).mean())
    assert np.array([shifted.value, shifted.low, shifted.high]) == pytest.approx(
        np.array([plain.value, plain.low, plain.high]) + 0.25
    )


def test_gain_is_deterministic_by_seed():
    rng = np.random.default_rng(5)
    before, after = rng.random(40), rng.random(40)
    groups = [i // 2 for i in range(40)]
    first = paired_gain(before, after, groups=groups, seed=1)
    assert first == paired_gain(before, after, groups=groups, seed=1)
    assert first != paired_gain(before, after, groups=groups, seed=2)


def test_gain_ignores_the_order_of_images_and_the_names_of_prompts():
    rng = np.random.default_rng(6)
    before, after = rng.random(120), rng.random(120)
    groups = rng.integers(25, size=120)
    expected = paired_gain(before, after, groups=groups.tolist(), seed=0)
    for _ in range(5):
        order = rng.permutation(120)
        names = [f"prompt {chr(97 + (7 * g) % 25)}" for g in groups[order]]
        assert paired_gain(before[order], after[order], groups=names, seed=0) == expected


def test_swapping_the_models_mirrors_the_gain():
    rng = np.random.default_rng(7)
    before, after = rng.random(200) < 0.4, rng.random(200) < 0.6
    groups = [i // 4 for i in range(200)]
    forth = paired_gain(before, after, groups=groups, seed=0)
    back = paired_gain(after, before, groups=groups, seed=0)
    assert back.value == -forth.value
    assert (back.low, back.high) == pytest.approx((-forth.high, -forth.low), abs=0.01)


def test_gain_interval_covers_the_truth_and_needs_the_prompts_for_it():
    rng = np.random.default_rng(8)
    cluster_hits, image_hits, trials = 0, 0, 400
    for _ in range(trials):
        effect = np.repeat(rng.normal(0.1, 0.3, size=40), 6)  # some prompts gain, some lose: 0.1 on average
        before = rng.normal(0.0, 1.0, size=240)
        after = before + effect + rng.normal(0.0, 0.1, size=240)
        by_prompt = paired_gain(before, after, groups=[i // 6 for i in range(240)], seed=0, resamples=600)
        by_image = paired_gain(before, after, groups=range(240), seed=0, resamples=600)
        cluster_hits += by_prompt.low <= 0.1 <= by_prompt.high
        image_hits += by_image.low <= 0.1 <= by_image.high
    assert 0.91 <= cluster_hits / trials <= 0.98
    assert image_hits / trials < 0.75


def test_a_gain_clear_of_zero_is_found_and_a_loss_too():
    before = np.arange(200) % 5 < 2
    after = np.arange(200) % 5 < 3
    groups = [i // 4 for i in range(200)]
    gain = paired_gain(before, after, groups=groups, seed=0)
    assert gain.is_above_zero and not gain.is_below_zero
    loss = paired_gain(after, before, groups=groups, seed=0)
    assert loss.is_below_zero and not loss.is_above_zero


@pytest.mark.parametrize("prompts", [2, 3, 5])
def test_few_prompts_have_student_s_interval(prompts):
    from scipy.stats import ttest_1samp

    gains = np.random.default_rng(3).normal(0.2, 1.0, size=prompts)
    ours = paired_gain(np.zeros(prompts), gains, groups=range(prompts), seed=0)
    theirs = ttest_1samp(gains, 0).confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-9)


def test_few_prompts_of_unequal_size_have_that_of_a_ratio():
    """Of the mean over images, whose error counts how far each prompt's sum is from its share of the whole."""
    sizes, means = np.array([1, 2, 6]), np.array([0.3, -0.2, 0.9])
    ours = paired_gain(np.zeros(9), np.repeat(means, sizes), groups=np.repeat(range(3), sizes).tolist(), seed=0)
    value = (sizes * means).sum() / 9
    error = np.sqrt(3 / 2 * ((sizes * (means - value)) ** 2).sum()) / 9
    assert ours.value == pytest.approx(value)
    assert ours.high - ours.value == pytest.approx(4.302652729911275 * error)  # Student's t of two degrees


def test_more_prompts_have_nearly_student_s_interval_by_resampling():
    from scipy.stats import norm, ttest_1samp

    gains = norm.ppf((np.arange(8) + 0.5) / 8)
    ours = paired_gain(np.zeros(8), gains, groups=range(8), seed=0)
    theirs = ttest_1samp(gains, 0).confidence_interval(0.95)
    assert 0.96 < (ours.high - ours.low) / (theirs.high - theirs.low) < 1.01


@pytest.mark.parametrize("prompts", [3, 5, 8])
def test_gain_interval_covers_the_truth_with_few_prompts(prompts):
    rng = np.random.default_rng(11)
    groups = [i // 6 for i in range(6 * prompts)]
    hits, trials = 0, 600
    for _ in range(trials):
        after = np.repeat(rng.normal(0.1, 0.3, size=prompts), 6) + rng.normal(0.0, 0.1, size=6 * prompts)
        gain = paired_gain(np.zeros(6 * prompts), after, groups=groups, seed=0, resamples=1000)
        hits += gain.low <= 0.1 <= gain.high
    assert 0.90 <= hits / trials <= 0.98


def test_accuracy_interval_covers_the_truth_with_few_prompts():
    rng = np.random.default_rng(12)
    hits, trials = 0, 600
    for _ in range(trials):
        holds, groups = clustered(rng, prompts=5, images=8, mean=0.5, concentration=1.5)
        share = accuracy(holds, groups=groups)
        hits += share.low <= 0.5 <= share.high
    assert hits / trials >= 0.93


def test_one_prompt_gives_no_interval():
    gain = paired_gain([False, False], [True, True], groups=["a", "a"], seed=0)
    assert gain == Interval(1.0, -np.inf, np.inf)
    assert not gain.is_above_zero


# tables


def test_tables_by_label_keep_order_and_add_up():
    rng = np.random.default_rng(9)
    before, after = rng.random(60) < 0.3, rng.random(60) < 0.6
    labels = (["single"] * 2 + ["count"] * 4) * 10
    groups = [f"{label} {i // 12}" for i, label in enumerate(labels)]
    rows = compare_by(before, after, labels, groups=groups, seed=0)
    whole = compare("all", before, after, groups=groups, seed=0)
    assert [row.name for row in rows] == ["single", "count"]
    assert [row.num_images for row in rows] == [20, 40]
    assert [row.num_prompts for row in rows] == [5, 5]
    assert whole.num_images == 60 and whole.num_prompts == 10
    assert sum(row.gain.value * row.num_images for row in rows) == pytest.approx(60 * whole.gain.value)
    assert tuple(map(sum, zip(*(row.outcomes for row in rows), strict=True))) == whole.outcomes
    fixed, broken = whole.outcomes[OUTCOMES.index("fixed")], whole.outcomes[OUTCOMES.index("broken")]
    assert (fixed - broken) / 60 == pytest.approx(whole.gain.value)
    shares = accuracy_by(before, labels, groups=groups)
    assert [(row.name, row.share) for row in shares] == [(row.name, row.before) for row in rows]


def test_outcomes_names_all_four():
    assert outcomes([False, True, True, False], [True, False, True, False]) == list(OUTCOMES)


def test_examples_are_drawn_by_seed_from_the_outcome_they_stand_for():
    rng = np.random.default_rng(10)
    found = outcomes(rng.random(300) < 0.5, rng.random(300) < 0.98)
    counts = dict.fromkeys(OUTCOMES, 20)
    drawn = draw_examples(found, counts=counts, seed=3)
    assert drawn == draw_examples(found, counts=counts, seed=3)
    assert drawn != draw_examples(found, counts=counts, seed=4)
    for outcome, indices in drawn.items():
        assert len(indices) == len(set(indices)) == min(20, found.count(outcome))
        assert all(found[i] == outcome for i in indices)
    assert max(drawn["fixed"]) > 150  # from the whole list, not from its beginning
    assert draw_examples(found, counts={"broken": 1, "fixed": 0}, seed=3)["fixed"] == []


def test_formats():
    assert format_share(Interval(0.523, 0.4806, 0.5644)) == "52.3 % [48.1, 56.4]"
    assert format_gain(Interval(0.142, 0.098, 0.185)) == "+14.2 points [+9.8, +18.5]"
    assert format_gain(Interval(-0.01, -0.04, 0.02)) == "-1.0 points [-4.0, +2.0]"


# bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: accuracy([]), "holds has shape (0,), but one number per image and at least one image are needed; "),
        (lambda: accuracy([[True]]), "holds has shape (1, 1), but one number per image"),
        (lambda: accuracy([0.2, 0.9]), "holds has dtype float64, but an accuracy counts booleans; compare scores"),
        (lambda: accuracy([True], groups=["a", "b"]), "groups has 2 entries for 1 images, but every image needs its"),
        (
            lambda: paired_gain([True], [True, False], groups=["a", "a"], seed=0),
            "before has 1 images and after has 2, but a paired gain compares image by image; evaluate both models on",
        ),
        (lambda: paired_gain([0.0, 1.0], [0.0, np.nan], groups="ab", seed=0), "after[1] is nan, but a mean needs"),
        (lambda: paired_gain([True], [True], groups=[], seed=0), "groups has 0 entries for 1 images"),
        (lambda: outcomes([True], [True, False]), "before has 1 images and after has 2"),
        (lambda: accuracy_by([True], ["a", "b"], groups=["x"]), "labels has 2 entries for 1 images"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
