"""The report of a training run: curves show what was logged, and the guide explains what is shown, and no more."""

import math

import numpy as np
import pytest
from PIL import Image

from rpo.evaluation.held_out import Judged, Sampling
from rpo.reports.facts import environment_facts, settings_facts
from rpo.reports.html import Report, render
from rpo.reports.training import (
    Findings,
    curves_section,
    guide_section,
    previews_section,
    watched_section,
    write_training_report,
)
from rpo.training.log import METRICS
from tests.trainers.online_runs import PROMPTS

PAIRS = [
    {
        "update": step,
        "loop/loss": 0.9,
        "dpo/loss": math.log(2) - (step - 1) / 1000,
        "dpo/implicit_accuracy": 0.5 + step / 1000,
        "dpo/margin": step / 100,
        "dpo/chosen_error_ratio": 1.0 + step / 1000,
        "dpo/rejected_error_ratio": 1.0 + step / 500,
    }
    for step in range(1, 31)
]
ONLINE = [
    {
        "update": step,
        "seconds": 2.0 * step,
        "loop/loss": 0.1,
        "reward/mean": 0.5 + step / 100,
        "reward/std": 0.3,
        "policy/kl": step / 10,
        **{f"value/explained_variance_{part}": 0.8 / part - (9.0 if step == 1 else 0) for part in range(1, 5)},
    }
    for step in range(1, 31)
]


def charts(entries):
    return {chart.title: chart for chart in curves_section(entries).charts}


def logged(entries, name):
    return tuple(entry[name] for entry in entries)


def test_a_preference_run_shows_loss_accuracy_margin_and_errors():
    drawn = charts(PAIRS)
    assert list(drawn) == ["Loss", "Implicit accuracy", "Margin", "Denoising error against the base"]
    assert set(PAIRS[0]) - {"update"} <= set(METRICS)
    assert drawn["Loss"].series[0].y == logged(PAIRS, "dpo/loss")  # not with the terms beside it
    better, worse = drawn["Denoising error against the base"].series
    assert (better.y, worse.y) == (logged(PAIRS, "dpo/chosen_error_ratio"), logged(PAIRS, "dpo/rejected_error_ratio"))
    assert better.x == tuple(range(1, 31))


def test_marks_tell_where_a_preference_run_starts():
    marks = {mark.label: mark.value for chart in charts(PAIRS).values() for mark in chart.marks}
    assert marks == {"log 2": pytest.approx(math.log(2)), "chance": 0.5, "start": 0.0, "base": 1.0}
    elsewhere = charts([entry | {"dpo/loss": 0.9} for entry in PAIRS])
    assert elsewhere["Loss"].marks == ()


def test_an_online_run_shows_reward_distance_and_value():
    drawn = charts(ONLINE)
    assert list(drawn) == [
        "Reward",
        "Reward against KL",
        "KL from the base",
        "Quality of the value",
        "Spread of rewards",
    ]
    assert drawn["Reward"].series[0].y == logged(ONLINE, "reward/mean")
    assert [(mark.label, mark.value) for mark in drawn["Reward"].marks] == [("start", 0.51)]
    assert {"reward/mean", "reward/std", "policy/kl"} <= set(METRICS)


def test_images_without_a_score_are_shown_where_there_were_any():
    none, some = ([entry | {"reward/failed": share} for entry in ONLINE] for share in (0.0, 0.05))
    assert list(charts(none)) == list(charts(ONLINE))
    assert charts(some)["Images without a score"].series[0].y == (0.05,) * 30
    assert set(charts(some)) - set(charts(ONLINE)) == {"Images without a score"}


def test_reward_against_kl_is_one_curve_in_the_order_of_updates():
    (series,) = charts(ONLINE)["Reward against KL"].series
    assert not series.is_noisy and len(series.x) == 30
    # Both grow evenly, so that a running mean leaves the inner points where they are.
    assert series.x[10:20] == pytest.approx([step / 10 for step in range(11, 21)])
    assert series.y[10:20] == pytest.approx([0.5 + step / 100 for step in range(11, 21)])
    assert "Reward against KL" not in charts([{"update": 1, "reward/mean": 0.5}])


def test_the_value_is_told_apart_by_time_and_cut_below():
    chart = charts(ONLINE)["Quality of the value"]
    assert [series.name for series in chart.series] == ["data end", "2nd quarter", "3rd quarter", "noise end"]
    assert chart.series[0].y[0] == -1.0 and chart.series[0].y[1] == pytest.approx(0.8)


def test_several_rewards_have_a_chart_each():
    entries = [entry | {"reward/light": 0.9, "reward/jpeg-compressibility": -3.0} for entry in ONLINE]
    assert charts(entries)["Reward: jpeg-compressibility"].series[0].y == (-3.0,) * 30
    assert charts(entries)["Reward: light"].series[0].y == (0.9,) * 30


def test_what_was_never_logged_has_no_chart():
    assert charts([]) == {}
    assert list(charts([{"update": 1, "reward/mean": 0.5, "policy/kl": None}])) == ["Reward"]


@pytest.mark.parametrize(
    ("entries", "explained"), [(PAIRS, {"margin", "error ratio"}), (ONLINE, {"KL", "explained variance", "spread"})]
)
def test_the_guide_explains_what_was_logged_and_nothing_else(entries, explained):
    if entries is ONLINE:
        entries = [entry | {"value/explained_variance": 0.5} for entry in entries]
    terms = {term for term, _ in guide_section(entries, is_judged=False).terms}
    assert explained <= terms
    other = {"margin", "error ratio"} if entries is not PAIRS else {"KL", "explained variance", "spread"}
    assert not other & terms and "95 % interval" not in terms
    assert "95 % interval" in {term for term, _ in guide_section(entries, is_judged=True).terms}


def watched(step):
    """What a look sees; between two of them nothing."""
    names = ("reward", "saturation", "colour_entropy", "edge_density", "sharpness", "high_frequency", "pixel_diversity")
    values = {f"watched/{name}": 2.0 + step / 10 for name in names} | {"held_out/clip-score": 30.0 - step}
    return values if step % 4 == 1 else dict.fromkeys(values)


def test_what_was_watched_is_one_figure_by_what_it_was_at_the_start():
    entries = [entry | watched(entry["update"]) for entry in ONLINE]
    (section,) = watched_section(entries, ["rollout 8: held_out/clip-score fell"])
    drawn = {chart.title: chart for chart in section.charts}
    assert list(drawn) == [
        "Trained reward",
        "Not trained on: clip-score",
        "Diversity, by that of the start",
        "Colours, by that of the start",
        "Detail, by that of the start",
    ]
    (score,) = drawn["Not trained on: clip-score"].series
    assert (score.x, score.y[:2]) == (tuple(range(1, 30, 4)), (29.0, 25.0))
    assert drawn["Colours, by that of the start"].series[0].y[1] == pytest.approx(2.5 / 2.1)
    assert "Alarm at rollout 8: held_out/clip-score fell." in section.note
    assert "No alarm." in watched_section(entries, [])[0].note


def test_one_look_and_none_are_no_figure():
    assert watched_section(ONLINE, []) == ()
    assert watched_section([ONLINE[0] | watched(1), ONLINE[1] | watched(2)], []) == ()


def test_curves_and_guide_make_a_page():
    page = render(Report("t", "s", (curves_section(PAIRS), guide_section(PAIRS, is_judged=False))))
    assert page.count("<svg") == 4
    assert "loss 0.69 → 0.65" in page and "log 2 = 0.693" in page


def grid(folder, update, rows=3, height=8, width=8):
    """Row r is of colour (update, r, 0)."""
    pixels = np.zeros((rows * height, 2 * width, 3), np.uint8)
    pixels[..., 0] = update
    pixels[..., 1] = np.repeat(np.arange(rows), height)[:, None]
    folder.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(folder / f"update-{update:06d}.png")


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 24), (24, 8), (24, 16)])
def test_previews_are_the_first_and_the_last_grid_row_by_row(tmp_path, height, width):
    for update in (0, 20, 100):
        grid(tmp_path, update, height=height, width=width)
    (section,) = previews_section(tmp_path, PROMPTS)
    assert (section.before, section.after) == ("update 0", "update 100")
    assert [row.prompt for row in section.rows] == list(PROMPTS)
    for index, row in enumerate(section.rows):
        assert row.before.shape == row.after.shape == (height, 2 * width, 3)
        assert row.before[0, 0].tolist() == [0, index, 0] and row.after[-1, -1].tolist() == [100, index, 0]
    page = render(Report("t", "s", (section,)))
    assert page.count("<img") == 6 and "a red circle" in page


def test_large_previews_are_made_smaller(tmp_path):
    for update in (0, 1):
        grid(tmp_path, update, rows=1, height=1024, width=1024)
    (section,) = previews_section(tmp_path, PROMPTS[:1])
    assert section.rows[0].after.shape == (512, 1024, 3)


def test_one_grid_shows_no_change(tmp_path):
    assert previews_section(tmp_path, PROMPTS) == ()
    grid(tmp_path, 0)
    assert previews_section(tmp_path, PROMPTS) == ()


def judged(*scores):
    return Judged(("a", "b", "c"), ("mine",) * 3, np.array(scores), Sampling(0))


def findings(folder, **changes):
    (folder / "metrics.jsonl").write_text(
        "".join(f'{{"update": {u}, "reward/mean": {u / 10}, "policy/kl": {u}}}\n' for u in range(1, 21))
    )
    given = {
        "method": "score as action",
        "folder": folder,
        "previews": folder / "previews",
        "saved": folder / "lora",
        "base_source": "some/model",
        "preparation": ("prepare(pipe)",),
        "updates": 20,
        "stopped_because": None,
        "previewed": PROMPTS,
        "base": None,
        "aligned": None,
        "settings": "prompts: p.txt\nclip: 0.1\nrollout:\n  eta: 1.0\n  max_steps: null\n",
        "seconds": {"train": 60.0},
    }
    return Findings(**given | changes)


def test_a_report_without_a_judge_says_what_became_of_the_reward(tmp_path):
    page = write_training_report(findings(tmp_path), tmp_path / "report.html").read_text()
    assert "In 20 updates the mean reward went from 0.15 to 1.95." in page
    assert page.index("some/model") < page.index("prepare(pipe)") < page.index("load_lora_weights")
    assert "import rpo.shapes" not in page


def test_a_report_of_a_judged_run_has_means_and_their_intervals(tmp_path):
    given = findings(tmp_path, base=judged(1.0, 2.0, 3.0), aligned=judged(2.0, 2.0, 5.0))
    page = write_training_report(given, tmp_path / "report.html").read_text()
    assert "mine 2 → 3" in page and "+1.000" in page


def test_a_report_of_full_fine_tuning_loads_the_pipeline(tmp_path):
    given = findings(tmp_path, saved=tmp_path / "pipeline", stopped_because="it broke")
    page = write_training_report(given, tmp_path / "report.html").read_text()
    assert str(tmp_path / "pipeline") in page and "load_lora_weights" not in page
    assert "Training was stopped: it broke." in page


def test_settings_are_told_section_by_section():
    assert settings_facts("a: 1\nflag: true\nnothing: null\nlist: []\nb:\n  c: x\n  d:\n    e: [1, 2]\n") == (
        ("Run", (("a", "1"), ("flag", "true"))),
        ("b", (("c", "x"),)),
        ("b.d", (("e", "1, 2"),)),
    )
    assert {"device", "rpo", "torch"} <= {name for name, _ in environment_facts()}
