import numpy as np
import pytest
from PIL import Image

from rpo.reports.facts import environment_facts, settings_facts
from rpo.reports.html import Report, render
from rpo.runs.online_report import OnlineFindings, curves_section, previews_section, write_online_report
from rpo.training.log import METRICS
from tests.trainers.online_runs import PROMPTS

ENTRIES = [
    {
        "update": step,
        "seconds": 2.0 * step,
        "reward/mean": 0.5 + step / 100,
        "reward/std": 0.3,
        "reward/shapes": 0.9,
        "reward/jpeg-compressibility": -3.0,
        "policy/kl": step / 10,
        **{f"value/explained_variance_{part}": 0.8 / part - (9.0 if step == 1 else 0) for part in range(1, 5)},
    }
    for step in range(1, 31)
]


def charts(entries, **options):
    return {chart.title: chart for chart in curves_section(entries, **options).charts}


def test_every_curve_shows_what_was_logged():
    drawn = charts(ENTRIES)
    assert list(drawn) == [
        "Reward",
        "Reward against KL",
        "KL from the base",
        "Quality of the value",
        "Spread of rewards",
    ]
    assert drawn["Reward"].series[0].y == tuple(entry["reward/mean"] for entry in ENTRIES)
    assert [(mark.label, mark.value) for mark in drawn["Reward"].marks] == [("start", 0.51)]
    assert {"reward/mean", "reward/std", "policy/kl"} <= set(METRICS)


def test_reward_against_kl_is_one_curve_in_the_order_of_updates():
    (series,) = charts(ENTRIES)["Reward against KL"].series
    assert not series.is_noisy and len(series.x) == 30
    # Both grow evenly, so that a running mean leaves the inner points where they are.
    assert series.x[10:20] == pytest.approx([step / 10 for step in range(11, 21)])
    assert series.y[10:20] == pytest.approx([0.5 + step / 100 for step in range(11, 21)])
    assert "Reward against KL" not in charts([{"update": 1, "reward/mean": 0.5}])


def test_the_value_is_told_apart_by_time_and_cut_below():
    chart = charts(ENTRIES)["Quality of the value"]
    assert [series.name for series in chart.series] == ["data end", "2nd quarter", "3rd quarter", "noise end"]
    assert chart.series[0].y[0] == -1.0 and chart.series[0].y[1] == pytest.approx(0.8)


def test_several_rewards_have_a_chart_each():
    assert "Reward: shapes" not in charts(ENTRIES, rewards=("shapes",))
    drawn = charts(ENTRIES, rewards=("shapes", "jpeg-compressibility"))
    assert drawn["Reward: jpeg-compressibility"].series[0].y == (-3.0,) * 30


def test_what_was_never_logged_has_no_chart():
    assert charts([]) == {}
    assert list(charts([{"update": 1, "reward/mean": 0.5, "policy/kl": None}])) == ["Reward"]


def grid(folder, update, rows=3, side=8):
    """Row r is of colour (update, r, 0)."""
    pixels = np.zeros((rows * side, 2 * side, 3), np.uint8)
    pixels[..., 0] = update
    pixels[..., 1] = np.repeat(np.arange(rows), side)[:, None]
    folder.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(folder / f"update-{update:06d}.png")


def test_previews_are_the_first_and_the_last_grid_row_by_row(tmp_path):
    for update in (0, 20, 100):
        grid(tmp_path, update)
    (section,) = previews_section(tmp_path, [*PROMPTS, *PROMPTS], columns=2)
    assert (section.before, section.after) == ("update 0", "update 100")
    assert [row.prompt for row in section.rows] == list(PROMPTS)
    for index, row in enumerate(section.rows):
        assert row.before.shape == row.after.shape == (8, 16, 3)
        assert row.before[0, 0].tolist() == [0, index, 0] and row.after[-1, -1].tolist() == [100, index, 0]
    page = render(Report("t", "s", (section,)))
    assert page.count("<img") == 6 and "a red circle" in page


def test_large_previews_are_made_smaller(tmp_path):
    for update in (0, 1):
        grid(tmp_path, update, rows=1, side=1024)
    (section,) = previews_section(tmp_path, PROMPTS, columns=2)
    assert section.rows[0].after.shape == (512, 1024, 3)


def test_one_grid_shows_no_change(tmp_path):
    assert previews_section(tmp_path, PROMPTS, columns=2) == ()
    grid(tmp_path, 0)
    assert previews_section(tmp_path, PROMPTS, columns=2) == ()


def findings(folder, **changes):
    (folder / "metrics.jsonl").write_text(
        "".join(f'{{"update": {u}, "reward/mean": {u / 10}, "policy/kl": {u}}}\n' for u in range(1, 21))
    )
    given = {
        "method": "score as action",
        "folder": folder,
        "previews": folder / "previews",
        "preview_columns": 4,
        "saved": folder / "lora",
        "base_expression": '"some/model"',
        "updates": 20,
        "stopped_because": None,
        "rewards": {"light": 1.0},
        "prompts": PROMPTS,
        "base": None,
        "aligned": None,
        "settings": "prompts: p.txt\ngrpo:\n  clip: 0.1\n  rollout:\n    eta: 1.0\n    max_steps: null\n",
        "seconds": {"train": 60.0},
        "seed": 0,
    }
    return OnlineFindings(**given | changes)


def test_a_report_without_a_verifier_says_what_became_of_the_reward(tmp_path):
    page = write_online_report(findings(tmp_path), tmp_path / "report.html").read_text()
    assert "<h1>Score as action</h1>" in page
    assert "In 20 updates the mean reward went from 0.15 to 1.95." in page
    assert "from_pretrained(&#34;some/model&#34;)" in page and "load_lora_weights" in page
    assert "import rpo.shapes" not in page


def test_a_report_of_full_fine_tuning_loads_the_pipeline(tmp_path):
    given = findings(tmp_path, saved=tmp_path / "pipeline", stopped_because="it broke")
    page = write_online_report(given, tmp_path / "report.html").read_text()
    assert f"from_pretrained(&#34;{tmp_path / 'pipeline'}&#34;)" in page and "load_lora_weights" not in page
    assert "Training was stopped: it broke." in page


def test_settings_are_told_section_by_section():
    assert settings_facts("a: 1\nflag: true\nnothing: null\nlist: []\nb:\n  c: x\n  d:\n    e: [1, 2]\n") == (
        ("Run", (("a", "1"), ("flag", "true"))),
        ("b", (("c", "x"),)),
        ("b.d", (("e", "1, 2"),)),
    )
    assert {"device", "rpo", "torch"} <= {name for name, _ in environment_facts()}
