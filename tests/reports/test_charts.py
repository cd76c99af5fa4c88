import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from rpo.reports.charts import MAX_POINTS, SMOOTHING, Chart, Mark, Series, curve, draw, draw_figure, running_mean


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def line(count, name="loss"):
    x = np.arange(1, count + 1)
    return Series(name, tuple(x.tolist()), tuple((0.7 + 0.1 * np.sin(x)).tolist()))


def colored_paths(svg):
    found = Elements(svg).found
    return [attrs["d"] for tag, attrs in found if tag == "path" and "var(--series" in attrs.get("style", "")]


def drawn_lines(svg):
    """Number of points of every coloured line."""
    return [len(re.findall(r"[ML] ", path)) for path in colored_paths(svg)]


def test_the_drawing_brings_no_colour_style_or_address_of_its_own():
    svg = draw(Chart("Loss", (line(60), line(60, "other")), (Mark("log 2", math.log(2)),)), name="c1")
    assert svg.startswith("<svg") and svg.endswith("</svg>")
    assert "<style" not in svg and "<script" not in svg and "http" not in svg and "xmlns" not in svg
    assert re.findall(r"#[0-9a-fA-F]{3,8}\b", svg) == []
    for variable in ("var(--series-0)", "var(--series-1)", "var(--rule)", "var(--quiet)", "currentColor"):
        assert variable in svg


def test_two_equal_charts_share_no_id_and_every_reference_resolves():
    chart = Chart("Loss", (line(60),))
    for name in ("c1", "c2"):
        elements = Elements(draw(chart, name=name)).found
        ids = [attrs["id"] for _, attrs in elements if "id" in attrs]
        assert len(ids) == len(set(ids)) and all(i.startswith(f"{name}-") for i in ids)
        referred = re.findall(r'(?:href="#|url\(#)([^")]+)', draw(chart, name=name))
        assert referred and set(referred) <= set(ids)


def test_drawing_is_deterministic():
    chart = Chart("Loss", (line(300),))
    assert draw(chart, name="c") == draw(chart, name="c")


def test_labels_and_title_are_in_the_drawing_and_escaped():
    svg = draw(Chart('a "b" <c> & d', (line(9),), (Mark("chance & <luck>", 0.7),), x_label="rollout"), name="c")
    assert Elements(svg).found[0][1]["aria-label"] == 'a "b" <c> & d'
    assert "chance &amp; &lt;luck>" in svg or "chance &amp; &lt;luck&gt;" in svg
    assert "rollout" in svg


def test_a_short_curve_is_drawn_once_and_a_noisy_one_with_its_running_mean():
    assert drawn_lines(draw(Chart("c", (line(SMOOTHING),)), name="c")) == [SMOOTHING]
    assert drawn_lines(draw(Chart("c", (line(90),)), name="c")) == [90, 90]


def test_a_very_long_curve_stays_small_and_ends_where_it_ends():
    svg = draw(Chart("c", (line(100_000),)), name="c")
    assert max(drawn_lines(svg)) <= MAX_POINTS
    assert len(svg) < 60_000


def test_running_mean_is_the_mean_of_the_neighbours():
    values = np.random.default_rng(0).random(40)
    smooth = running_mean(values, 7)
    for i in range(40):
        assert smooth[i] == pytest.approx(values[max(0, i - 3) : i + 4].mean())
    assert running_mean(values, 1) == pytest.approx(values)


def test_curve_keeps_what_was_logged_and_finite():
    entries = [
        {"update": 1, "loop/loss": 0.69},
        {"update": 2, "loop/loss": None, "dpo/margin": 0.1},
        {"update": 3, "loop/loss": math.nan},
        {"update": 4, "loop/loss": 0.65},
    ]
    assert curve(entries, "loop/loss", name="loss") == Series("loss", (1.0, 4.0), (0.69, 0.65))
    assert curve(entries, "dpo/margin", name="margin") == Series("margin", (2.0,), (0.1,))
    assert curve(entries, "never", name="n") == Series("n", (), ())


@pytest.mark.parametrize(
    ("series", "message"),
    [
        ((), "chart 'c' has 0 curves, but 1 to 4 can be told apart; leave the chart out, or split it"),
        ((line(3),) * 5, "chart 'c' has 5 curves, but 1 to 4 can be told apart"),
        ((Series("loss", (), ()),), "curve 'loss' has 0 x and 0 y, but needs as many of both and at least one; leave"),
        ((Series("loss", (1.0, 2.0), (1.0,)),), "curve 'loss' has 2 x and 1 y"),
    ],
)
def test_nothing_to_draw_is_an_error(series, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        draw(Chart("c", series), name="c")


def test_a_figure_is_a_whole_svg_file_with_titles_legends_and_explanations():
    left = Chart(
        "Left & <first>", (line(60, "alpha"), line(60, "beta")), (Mark("log 2", math.log(2)),), "How to read it."
    )
    right = Chart("Right", (line(60, "gamma"),), (), "A long explanation " * 8, x_label="rollout")
    svg = draw_figure([left, right])
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    text = " ".join("".join(root.itertext()).split())
    for words in ("Left & <first>", "Right", "alpha", "beta", "gamma", "log 2", "How to read it.", "update", "rollout"):
        assert words in text
    assert text.count("A long explanation") == 8
    assert "var(--" not in svg and "#0a0b" not in svg, "a file has no page to take its colours from"
    assert svg == draw_figure([left, right])


def test_a_curve_without_noise_is_drawn_as_it_is():
    noisy = line(90)
    exact = Series(noisy.name, noisy.x, noisy.y, is_noisy=False)
    (drawn,) = colored_paths(draw(Chart("c", (exact,)), name="c"))
    raw, smoothed = colored_paths(draw(Chart("c", (noisy,)), name="c"))
    assert drawn == raw != smoothed


def test_a_figure_needs_a_chart():
    with pytest.raises(ValueError, match="^there are 0 charts, but a figure shows at least one; leave the figure out$"):
        draw_figure([])


def test_a_logarithmic_chart_puts_equal_factors_at_equal_distances():
    chart = Chart("Growth", (Series("one", (1.0, 10.0, 100.0), (0.0, 1.0, 2.0), is_noisy=False),), is_log=True)
    (path,) = colored_paths(draw(chart, name="c"))
    xs = [float(at) for at in re.findall(r"[ML] (\S+)", path)]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], rel=1e-3)


def test_x_is_marked_at_the_ticks_that_are_given():
    series = (Series("one", (2.0, 4.0, 16.0), (0.0, 1.0, 2.0), is_noisy=False),)
    drawn = draw(Chart("Growth", series, is_log=True, ticks=(2.0, 4.0, 16.0)), name="c")
    assert [text for text in re.findall(r"<text[^>]*>([^<]+)</text>", drawn) if text in ("2", "4", "10", "16")][:3] == [
        "2",
        "4",
        "16",
    ]
