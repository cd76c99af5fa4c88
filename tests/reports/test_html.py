import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import rpo.reports.html
from rpo.evaluation.comparison import Interval, PairedComparison, compare
from rpo.evaluation.contest import contest
from rpo.reports.charts import Chart, Mark, Series
from rpo.reports.html import TEMPLATES, Report, data_uri, format_duration, photo_uri, render, write_report
from rpo.reports.sections import (
    PERCENT,
    CommandsSection,
    ContestGroup,
    ContestRow,
    ContestsSection,
    CurvesSection,
    FactsSection,
    ImagePair,
    JudgedImage,
    Lineup,
    LineupGroup,
    LineupImage,
    LineupsSection,
    NumbersSection,
    PairGroup,
    PairsSection,
    Scale,
    Snippet,
    StagesSection,
    TableGroup,
    TableSection,
    TextSection,
)

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """The page as elements and text; fails on a tag that does not close what is open."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open, self.pieces = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.pieces.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.pieces)).replace("\xa0", " ")

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def comparison(name, before, after, gain, images=480, prompts=120):
    return PairedComparison(
        name, images, prompts, Interval(*before), Interval(*after), Interval(*gain), (61, 9, 230, 180)
    )


def picture(seed, size=64):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def pair(seed, prompt="a red circle above a blue square", size=64):
    return ImagePair(
        prompt,
        JudgedImage(picture(seed, size), False, "missing: a blue square"),
        JudgedImage(picture(seed + 1, size), True, "shows it"),
        "relation",
    )


def full_report():
    in_domain = comparison("In-domain", (0.521, 0.476, 0.566), (0.663, 0.619, 0.704), (0.142, 0.098, 0.185))
    out_domain = comparison("Out-of-domain", (0.31, 0.25, 0.37), (0.302, 0.24, 0.36), (-0.008, -0.05, 0.03), 240, 57)
    curves = Chart(
        "Loss",
        (Series("loss", tuple(range(50)), tuple(0.69 - i / 1000 for i in range(50))),),
        (Mark("log 2", 0.693),),
        "Starts at log 2.",
    )
    return Report(
        title="Diffusion-DPO on shapes",
        summary="66 % of held-out prompts come out right, up from 52 %.",
        subtitle="rank 16",
        sections=(
            NumbersSection("The result", (in_domain, out_domain), note="Judged by the verifier."),
            TableSection("By kind", (TableGroup("In-domain", (in_domain,)), TableGroup("Elsewhere", (out_domain,)))),
            PairsSection(
                "Before and after",
                (PairGroup("fixed", 61, (pair(1), pair(3))), PairGroup("broken", 9, (pair(5),), "the price")),
                "Drawn at random with seed 0 from all 480 images.",
            ),
            CurvesSection("How training went", (curves, curves), note="Faint: every update."),
            TextSection("What the numbers mean", ("One paragraph.",), (("loss", "0.69 to 0.65 is normal."),)),
            CommandsSection(
                "Use it", (Snippet("Load it", 'pipe.load_lora_weights("runs/lora")\n    indented & <kept>'),)
            ),
            StagesSection("Time", (("sample", 92.3), ("train", 203.0)), note="On two cores."),
            FactsSection(
                "Settings", (("Training", (("beta", "150"), ("rank", "16"))), ("Versions", (("torch", "2.13"),)))
            ),
        ),
    )


def test_every_number_and_every_word_is_in_the_page():
    text = Page(render(full_report())).text
    for expected in [
        "Diffusion-DPO on shapes", "66 % of held-out prompts come out right, up from 52 %.", "rank 16",
        "52.1 %", "66.3 %", "+14.2 points", "95 % interval +9.8 to +18.5", "clear gain", "480 images of 120 prompts",
        "31.0 %", "30.2 %", "−0.8 points", "95 % interval −5.0 to +3.0", "no significant change",
        "240 images of 57 prompts",
        "47.6 to 56.6", "480 120 prompts", "61.9 to 70.4", "24.0 to 36.0", "Judged by the verifier.", "Elsewhere",
        "fixed 61", "broken 9", "of 70 images", "2 shown of 61", "1 shown of 9 · the price",
        "Drawn at random with seed 0 from all 480 images.", "missing: a blue square", "✗ fails", "✓ holds", "relation",
        "Starts at log 2.", "Faint: every update.", "log 2", "One paragraph.", "0.69 to 0.65 is normal.", "Load it",
        "1 min 32 s", "3 min 23 s", "4 min 55 s", "On two cores.", "beta 150", "torch 2.13",
    ]:  # fmt: skip
        assert expected in text, expected


def test_nothing_is_requested_from_anywhere():
    html = render(full_report())
    page = Page(html)
    assert (
        "http:" not in html and "https:" not in html and "//" not in re.sub(r"data:image/png;base64,[\w+/=]+", "", html)
    )
    for tag, attrs in page.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert attrs.get(name, "#").startswith(("#", "data:")), (tag, attrs)
    assert set(re.findall(r"url\(([^)]*)\)", html)) <= {
        f"#{attrs['id']}" for _, attrs in page.elements if "id" in attrs
    }
    assert "@import" not in html
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy.split("; ")[0] == "default-src 'none'"
    assert "img-src data:" in policy


def test_ids_are_unique_and_the_contents_list_leads_to_every_section():
    page = Page(render(full_report()))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert [link["href"] for link in page.all("a")] == [f"#{section['id']}" for section in page.all("section")]
    assert len(page.all("section")) == len(full_report().sections)


def test_images_are_inline_pixel_for_pixel_and_in_order():
    page = Page(render(full_report()))
    shown = []
    for image in page.all("img"):
        png = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
        shown.append(np.asarray(Image.open(io.BytesIO(png))))
        assert (image["width"], image["height"]) == ("64", "64")
    expected = [picture(seed) for seed in (1, 2, 3, 4, 5, 6)]
    assert len(shown) == 6 and all((a == b).all() for a, b in zip(shown, expected, strict=True))


def test_small_images_are_enlarged_without_blur_and_photographs_are_not_touched():
    groups = (PairGroup("fixed", 2, (pair(1, size=64), pair(3, size=256))),)
    page = Page(render(Report("t", "s", (PairsSection("p", groups, "all"),))))
    assert [image.get("class") for image in page.all("img")] == ["pixels", "pixels", None, None]
    assert re.search(r"img\.pixels \{ image-rendering: pixelated", (TEMPLATES / "report.css").read_text())


def test_texts_cannot_break_out_of_the_page():
    nasty = '<script>alert(1)</script> & "quoted"'
    report = Report(
        nasty,
        nasty,
        (
            PairsSection(nasty, (PairGroup("fixed", 1, (pair(0, prompt=nasty),), nasty),), nasty),
            CurvesSection(nasty, (Chart(nasty, (Series(nasty, (1.0,), (1.0,)), Series("b", (1.0,), (1.0,)))),)),
            CommandsSection(nasty, (Snippet(nasty, nasty),)),
            FactsSection(nasty, ((nasty, ((nasty, nasty),)),)),
        ),
    )
    page = Page(render(report))
    assert len(page.all("script")) == 1
    assert page.text.count(nasty) > 10


def test_code_is_kept_to_the_letter():
    html = render(full_report())
    code = re.search(r"<pre><code>(.*?)</code></pre>", html, re.DOTALL)
    assert code and code[1] == "pipe.load_lora_weights(&#34;runs/lora&#34;)\n    indented &amp; &lt;kept&gt;"


def test_a_significant_loss_is_called_one():
    worse = comparison("x", (0.5, 0.45, 0.55), (0.4, 0.35, 0.45), (-0.1, -0.14, -0.06))
    page = Page(render(Report("t", "s", (NumbersSection("n", (worse,)),))))
    assert "clear loss" in page.text and "clear gain" not in page.text
    assert any("worse" in attrs.get("class", "").split() for _, attrs in page.elements)


def test_a_single_prompt_shows_its_unbounded_interval():
    one = compare("x", [False, True], [True, True], groups=["a", "a"], seed=0)
    text = Page(render(Report("t", "s", (NumbersSection("n", (one,)),)))).text
    assert "−∞ to +∞ · no significant change" in text


def test_bands_and_dots_lie_where_the_numbers_are():
    row = comparison("x", (0.25, 0.2, 0.3), (0.75, 0.7, 0.8), (0.5, 0.4, 0.6))
    html = render(Report("t", "s", (NumbersSection("n", (row,)),)))
    assert re.findall(r'class="band \w+" style="([^"]*)"', html) == ["left:20.0%;width:10.0%", "left:70.0%;width:10.0%"]
    assert re.findall(r'class="dot \w+" style="([^"]*)"', html) == ["left:25.0%", "left:75.0%"]


def test_other_measures_have_their_own_scale():
    scale = Scale(factor=1, unit="", gain_unit="", digits=2, low=-1, high=3)
    row = comparison("PickScore", (1.0, 0.9, 1.1), (1.25, 1.1, 1.4), (0.25, 0.1, 0.4))
    text = Page(render(Report("t", "s", (TableSection("n", (TableGroup("g", (row,)),), scale=scale),)))).text
    assert "1.00" in text and "1.25" in text and "+0.25" in text and "+0.10 to +0.40" in text and "axis −1 to 3" in text
    assert (scale.position(-1), scale.position(1), scale.position(9)) == (0.0, 50.0, 100.0)
    assert PERCENT.axis == "0 to 100 %"


def test_images_without_a_judge_have_no_badge():
    judged = JudgedImage(picture(0))
    groups = (PairGroup("still holds", 1, (ImagePair("p", judged, judged),)),)
    page = Page(render(Report("t", "s", (PairsSection("p", groups, "all"),))))
    assert "holds" not in page.text.replace("still holds", "").replace("Still holds", "") and "fails" not in page.text


def test_rendering_is_deterministic():
    assert render(full_report()) == render(full_report())


def test_an_older_report_survives_a_failed_one(tmp_path):
    path = tmp_path / "runs" / "quickstart" / "report.html"
    assert write_report(full_report(), path) == path
    before = path.read_bytes()
    broken = Report("t", "s", (CurvesSection("c", (Chart("c", ()),)),))
    with pytest.raises(ValueError, match="chart 'c' has 0 curves"):
        write_report(broken, path)
    assert path.read_bytes() == before == render(full_report()).encode()
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_every_section_has_its_template():
    for partial in rpo.reports.html._PARTIALS.values():
        assert (TEMPLATES / f"{partial}.html.j2").is_file()


@pytest.mark.parametrize(
    ("pixels", "given"),
    [
        (np.zeros((8, 8, 3), dtype=np.float32), "dtype float32 and shape (8, 8, 3)"),
        (np.zeros((3, 8, 8), dtype=np.uint8), "dtype uint8 and shape (3, 8, 8)"),
        (np.zeros((8, 8), dtype=np.uint8), "dtype uint8 and shape (8, 8)"),
    ],
)
def test_only_uint8_images_are_shown(pixels, given):
    expected = f"image has {given}, but a report shows uint8 [height, width, 3]; convert with"
    with pytest.raises(ValueError, match=re.escape(expected)):
        data_uri(pixels)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.4231, "0.42 s"),
        (9.94, "9.9 s"),
        (9.99, "10 s"),
        (59.6, "1 min 0 s"),
        (372, "6 min 12 s"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("shape", "kind", "shown"), [((64, 128), "png", (128, 64)), ((640, 320), "jpeg", (160, 320))])
def test_a_photo_is_made_smaller_and_a_small_image_is_left_as_it_is(shape, kind, shown):
    pixels = np.broadcast_to(np.linspace(0, 255, shape[1]).astype(np.uint8)[None, :, None], (*shape, 3))
    name, _, data = photo_uri(pixels).partition(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (name, image.size) == (f"data:image/{kind}", shown)
    if kind == "png":
        assert np.array_equal(np.asarray(image), pixels)


def row(name, before, after):
    return ContestRow(name, contest("all", before, after, ["a", "b", "c"]))


def test_contests_are_drawn_around_zero_and_lineups_show_every_model():
    rows = (row("mine", [0, 0, 0], [1, 1, 1]), row("<other>", [1, 2, 3], [1, 2, 3]), row("worse", [1, 1, 1], [0, 0, 0]))
    group = ContestGroup("judge", rows, Scale(1, "", "", 2, -2, 2))
    noise = np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3), dtype=np.uint8)
    images = tuple(LineupImage(f"model {number}", one, (f"judge {number}",)) for number, one in enumerate(noise))
    lineups = LineupsSection("Images", (LineupGroup("wins", (Lineup("a <b>", images),)),), "by chance")
    text = render(Report("t", "s", (ContestsSection("Contests", (group,)), lineups)))
    places = re.findall(r'class="forest (\w+)".*?class="dot" style="left:([\d.]+)%"', text)
    assert places == [("better", "75.0"), ("unclear", "50.0"), ("worse", "25.0")]
    assert "&lt;other&gt;" in text and "a &lt;b&gt;" in text and "<other>" not in text
    assert all(data_uri(one) in text for one in noise)
