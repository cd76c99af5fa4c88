import math

from rpo.reports.dpo import READING_GUIDE, curves_section
from rpo.reports.html import Report, render
from rpo.training.log import METRICS

ENTRIES = [
    {
        "update": step,
        "loop/loss": 0.7 - step / 1000,
        "dpo/implicit_accuracy": 0.5 + step / 1000,
        "dpo/margin": step / 100,
        "dpo/chosen_error_ratio": 1.0 + step / 1000,
        "dpo/rejected_error_ratio": 1.0 + step / 500,
    }
    for step in range(1, 31)
]


def test_every_curve_is_a_metric_that_is_logged_and_shows_its_values():
    section = curves_section(ENTRIES, error_ratio_limit=1.5)
    assert [chart.title for chart in section.charts] == [
        "Loss",
        "Implicit accuracy",
        "Margin",
        "Denoising error against the base",
    ]
    assert set(ENTRIES[0]) - {"update"} <= set(METRICS)
    assert section.charts[0].series[0].y == tuple(entry["loop/loss"] for entry in ENTRIES)
    better, worse = section.charts[3].series
    assert better.y == tuple(entry["dpo/chosen_error_ratio"] for entry in ENTRIES)
    assert worse.y == tuple(entry["dpo/rejected_error_ratio"] for entry in ENTRIES)
    assert better.x == tuple(range(1, 31))


def test_marks_tell_start_chance_and_limit():
    charts = curves_section(ENTRIES, error_ratio_limit=1.5).charts
    marks = {mark.label: mark.value for chart in charts for mark in chart.marks}
    assert marks == {"log 2": math.log(2), "chance": 0.5, "start": 0.0, "base": 1.0, "limit": 1.5}
    assert "limit" not in {mark.label for mark in curves_section(ENTRIES, error_ratio_limit=math.inf).charts[3].marks}


def test_another_objective_starts_elsewhere():
    charts = curves_section(ENTRIES, error_ratio_limit=1.5, is_plain=False).charts
    assert charts[0].marks == () and "log 2" not in charts[0].explanation


def test_the_preference_term_is_shown_where_it_is_logged_apart():
    entries = [entry | {"dpo/loss": 0.6} for entry in ENTRIES]
    assert curves_section(entries, error_ratio_limit=math.inf).charts[0].series[0].y == (0.6,) * 30


def test_what_was_never_logged_has_no_chart():
    entries = [{"update": 1, "loop/loss": 0.69}, {"update": 2, "loop/loss": None}]
    assert [chart.title for chart in curves_section(entries, error_ratio_limit=math.inf).charts] == ["Loss"]
    assert curves_section([], error_ratio_limit=math.inf).charts == ()


def test_it_makes_a_page_that_explains_itself():
    page = render(Report("t", "s", (curves_section(ENTRIES, error_ratio_limit=1.5), READING_GUIDE)))
    assert page.count("<svg") == 4
    assert "loss 0.69 → 0.65" in page and "log 2 = 0.693" in page
