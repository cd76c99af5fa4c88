"""The page of a run: everything in it, nothing that runs, counts of all records, a fair selection."""

import base64
import hashlib
import io
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from rpo.cli.main import main
from rpo.curation import page as page_module
from rpo.curation.fates import FAULT_WORDS, STEPS, WORDS, Fate, count_steps, fate_of, select
from rpo.curation.page import image_side, script_json, write_page
from rpo.curation.page_records import AMPLIFICATION, difference, shown, who, written
from rpo.curation.records import FaultKind, Reason, histories
from rpo.curation.store.run import CurationRun
from tests.curation.fakes import whole, write_run
from tests.curation.page_folder import FAULTS, KINDS, NASTY, PROMPT_SHA256, make_run


def text_of(page):
    return Path(page).read_text("utf-8")


def decoded(data):
    return Image.open(io.BytesIO(data)).convert("RGB")


VOID = {"meta", "link", "input", "img", "br"}

UNDER_WAY = ("sources", "critiques", "instructions", "edits", "scores")


class Page(HTMLParser):
    """The page as elements, text, and what its data says; fails on a tag that does not close what is open."""

    def __init__(self, html):
        super().__init__()
        self.html, self.elements, self.open, self.pieces, self.scripts = html, [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []
        self.data = json.loads(self.scripts[0])
        self.records = {one["caption"]: one for one in self.data["records"]}

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.pieces.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.pieces)).strip()

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    captions = [f"{kind} {place}" for place, kind in enumerate(KINDS)]
    return make_run(tmp_path_factory.mktemp("page") / "run", captions=captions)


@pytest.fixture(scope="module")
def page(run):
    return Page(text_of(write_page(run)))


def record_of(page, kind):
    return next(one for caption, one in page.records.items() if caption.startswith(f"{kind} "))


def pixels(address):
    head, data = address.split(",")
    return head, np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def test_the_page_is_beside_the_records_or_where_it_is_wanted(run, page, tmp_path):
    assert page.html == (run / "pairs.html").read_text("utf-8")
    wanted = tmp_path / "new" / "page.html"
    assert write_page(str(run), str(wanted)) == str(wanted)
    assert wanted.read_bytes() == (run / "pairs.html").read_bytes()
    assert [path.name for path in wanted.parent.iterdir()] == ["page.html"]


def test_every_kind_of_record_has_its_outcome(page):
    assert len(page.records) == len(KINDS) + 1  # the two sides of the pair have one caption
    for place, kind in enumerate(KINDS):
        expected = "undecided" if kind in UNDER_WAY else "critique_fault" if kind == "empty" else kind
        assert page.records[f"{kind} {place}"]["outcome"] == expected


def test_a_pair_has_everything_that_is_known_of_it(page, run):
    record = record_of(page, "kept_edit")
    assert record["because"] == "shapes-clip says so"
    assert record["critique"]["overall"] == 4
    assert record["critique"]["keep"] == ["the background"]
    first, second = record["critique"]["problems"]
    assert (first["where"], first["severity"]) == ("upper left", 3)
    assert second == {"what": "edges are soft", "where": "", "severity": 1}
    assert record["instructions"][0] in first["what"]
    assert record["starts"] == list(dict.fromkeys(text.split()[0] for text in record["instructions"]))
    assert [tuple(score.values()) for score in record["scores"]] == [
        ("shapes-clip", "filter", "0.210", "0.580", "+0.370", "up"),
        ("jpeg", "filter", "1.500", "1.750", "+0.250", "up"),
        ("shapes", "evaluates, never decides", "0", "1.000", "+1.000", "up"),
    ]
    assert record["measures"][1] == ["cosine of the embeddings", "0.938"]
    facts = dict(record["provenance"])
    assert facts["critic"] == f"server, some/critic-7b, prompt {PROMPT_SHA256[:12]}…"
    assert facts["instructor"] == "shapes"
    assert facts["editor"] == "instruct-pix2pix, some/editor, revision 0123456789ab"
    assert facts["seed of the edit"] == "1000"
    assert facts["source"] == "kind generated, seed 0, prompt 0, image 0"
    assert {facts["source image"], facts["edit image"]} <= set(whole(run).images)
    assert record["faults"] == []


def test_small_images_are_kept_pixel_for_pixel_and_their_difference_is_amplified(page, run):
    record = record_of(page, "kept_edit")
    facts, images = dict(record["provenance"]), record["images"]
    kept = whole(run).images
    originals = [np.asarray(decoded(kept[facts[f"{kind} image"]])).astype(int) for kind in ("source", "edit")]
    found = {kind: pixels(images[kind]) for kind in ("source", "edit", "difference")}
    assert {head for head, _ in found.values()} == {"data:image/png;base64"}
    assert (found["source"][1] == originals[0]).all() and (found["edit"][1] == originals[1]).all()
    expected = np.minimum(np.abs(originals[0] - originals[1]) * AMPLIFICATION, 255)
    assert (found["difference"][1] == expected).all() and expected.max() > 0
    assert images["has_pixels"] and images["size"] == [64, 64]
    assert page.data["amplification"] == AMPLIFICATION


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_shown_with_what_was_really_said(page, kind):
    (fault,) = record_of(page, kind)["faults"]
    expected = FAULTS[kind]
    assert (fault["kind"], fault["message"], fault["raw"]) == (expected.kind, expected.message, expected.raw)
    assert fault["words"] == FAULT_WORDS[expected.kind]


def test_what_was_not_reached_is_empty(page):
    fresh, fixed = record_of(page, "sources"), record_of(page, "nothing_to_fix")
    assert fresh["critique"] is None and fresh["instructions"] is None and fresh["scores"] == []
    assert fresh["images"]["source"] and not fresh["images"]["edit"] and not fresh["images"]["difference"]
    assert [name for name, _ in fresh["provenance"]] == ["record", "source", "source image"]
    assert fixed["critique"]["problems"] == [] and fixed["instructions"] is None
    assert record_of(page, "no_instructions")["instructions"] == []


def test_signs_and_losses(page):
    worse = record_of(page, "got_worse")["scores"]
    assert (worse[0]["change"], worse[0]["direction"]) == ("−0.390", "down")
    equal = record_of(page, "equal_scores")["scores"]
    assert (equal[0]["change"], equal[0]["direction"]) == ("0", "same")


def test_outcomes_across_a_given_pair_are_told_with_both_sides(page):
    sides = [one for one in page.data["records"] if one["caption"] == "a pair"]
    chosen, rejected = sides
    assert (
        f"this source preferred to the source of {rejected['id']} (the pair came with this label)" in chosen["others"]
    )
    assert (
        f"the source of {chosen['id']} preferred to this source (the pair came with this label)" in rejected["others"]
    )
    assert len(chosen["others"]) == len(rejected["others"]) == 4
    assert f"{chosen['id']}, as its rejected side" in dict(rejected["provenance"])["done together with"]


def test_counts_are_of_all_records_however_few_are_shown(run, page, tmp_path):
    few = Page(text_of(write_page(run, tmp_path / "few.html", max_records=3)))
    steps = re.search(r"What came through (.*) Record by record", page.text)[1]
    assert steps == re.search(r"What came through (.*) Record by record", few.text)[1]
    assert len(few.data["records"]) == 3
    total = len(KINDS) + 2
    assert f"3 of {total} records are shown" in few.text and "The counts above are of all records." in few.text
    assert f"All {total} records are shown." in page.text
    assert (
        "6 of 24 records became preference pairs (25.0 %); in 1 of them the source is preferred; 3 further" in page.text
    )
    assert "5 are not decided yet." in page.text


def test_steps_count_who_came_through_and_why_the_others_did_not(run):
    steps = count_steps(fate_of(one) for one in histories(CurationRun(run)))
    assert [step.name for step in steps] == list(STEPS)
    assert [step.count for step in steps] == [24, 21, 20, 17, 15, 13, 10, 6]
    assert dict(steps[0].lost) == {"critique_fault": 2, "undecided": 1}
    assert steps[1].lost == (("nothing_to_fix", 1),)
    assert dict(steps[5].lost) == {"too_close": 1, "too_far": 1, "undecided": 1}
    for step, following in zip(steps, steps[1:], strict=False):
        assert step.count - following.count == sum(count for _, count in step.lost)
    assert steps[-1].lost == ()


def fates(counts):
    """Fates with ids that have nothing to do with their order."""
    return [
        Fate(hashlib.sha256(f"{outcome}{faults}{n}".encode()).hexdigest()[:16], outcome, faults, 0)
        for (outcome, faults), count in counts.items()
        for n in range(count)
    ]


def test_the_selection_is_balanced_in_order_and_the_same_every_time():
    every = fates(
        {
            ("kept_edit", ()): 500,
            ("got_worse", ()): 300,
            ("critique_fault", ("parse_error",)): 40,
            ("critique_fault", ("raised",)): 3,
            ("too_far", ()): 1,
        }
    )
    chosen = select(every, 64)
    counts = Counter((one.outcome, one.faults) for one in chosen)
    assert sorted(counts.values()) == [1, 3, 20, 20, 20]
    assert chosen == select(every, 64) == [one for one in every if one in chosen]
    assert select(every[::-1], 64) == chosen[::-1]
    worse = sorted(one.record for one in every if one.outcome == "got_worse")
    assert {one.record for one in chosen if one.outcome == "got_worse"} == set(worse[:20])
    assert select(every, 10_000) == every
    assert len({(one.outcome, one.faults) for one in select(every, 5)}) == 5


def test_texts_of_records_run_nowhere_and_end_nothing(tmp_path):
    captions = [NASTY, "lone \ud800 surrogate", "]]> --> </style></title>", "'\"`${alert(1)}"]
    kinds = ("kept_edit", "critique_fault", "instruction_fault", "got_worse")
    plain = Page(text_of(write_page(make_run(tmp_path / "plain", kinds))))
    nasty_page = write_page(make_run(tmp_path / "<b>run", kinds, captions=captions[:1] + ["b"] + captions[2:]))
    nasty = Page(text_of(nasty_page))
    assert [tag for tag, _ in nasty.elements] == [tag for tag, _ in plain.elements]
    assert set(captions) - {captions[1]} <= set(nasty.records)
    assert "<" not in nasty.scripts[0]
    assert "alert" not in nasty.text and "Pairs of <b>run" in nasty.text
    assert json.loads(script_json(captions)) == captions
    assert script_json("</script><!--").count("<") == 0


def test_only_the_pages_own_script_may_run(page):
    data, script = page.all("script")
    assert data == {"type": "application/json", "id": "data"} and script == {}
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy and policy.startswith("default-src 'none'; img-src data:;")
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert forbidden not in page.scripts[1]


def test_nothing_is_requested_from_anywhere(page):
    assert "http:" not in page.html and "https:" not in page.html and "@import" not in page.html
    without_images = re.sub(r"data:image/[a-z]+;base64,[\w+/=]+", "", page.html)
    assert not re.search(r"(src|href|url\()=?[\"' ]*//", without_images)
    for tag, attrs in page.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert attrs.get(name, "#").startswith(("#", "data:")), (tag, attrs)


def test_what_the_script_looks_for_is_there(page):
    for name in ("q", "outcome", "fault", "starts"):
        (field,) = [attrs for _, attrs in page.elements if attrs.get("name") == name]
        assert f"{name}:" in page.scripts[1] or f"elements.{name}" in page.scripts[1], field
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"getElementById\(\"(\w+)\"\)", page.scripts[1])) == {"data", "leaf", "said"} <= set(ids)
    outcomes = {attrs["data-outcome"] for attrs in page.all("button") if "data-outcome" in attrs}
    values = {attrs["value"] for attrs in page.all("option")}
    assert outcomes <= values and {"kept", "dropped", "any", *FAULT_WORDS} <= values
    shown_fields = set(page.data["records"][0])
    assert set(re.findall(r"\brecord\.(\w+)", page.scripts[1])) <= shown_fields
    assert shown_fields - {"measures", "provenance", "others"} <= set(re.findall(r"\.(\w+)", page.scripts[1]))


def test_every_reason_and_every_fault_has_words():
    assert set(get_args(Reason)) | {"kept_edit", "kept_source", "undecided"} == set(WORDS)
    assert set(get_args(FaultKind)) == set(FAULT_WORDS)
    assert len({name for name, _ in WORDS.values()}) == len(WORDS)


def test_photographs_are_shrunk_and_compressed_and_the_page_says_so(tmp_path):
    run = make_run(tmp_path / "run", ("kept_edit", "nothing_to_fix"), size=640, has_pair=False)
    page = Page(text_of(write_page(run)))
    assert "Images are shrunk to 512 pixels and compressed; those in the folder are not." in page.text
    images = page.data["records"][0]["images"]
    for kind in ("source", "edit", "difference"):
        head, found = pixels(images[kind])
        assert head == "data:image/webp;base64" and found.shape == (512, 512, 3)
    assert images["size"] == [640, 640] and not images["has_pixels"]


def test_more_records_have_smaller_images():
    assert image_side(0) == image_side(240) == 512
    assert image_side(400) == 396
    assert image_side(400) ** 2 * 400 <= page_module.PIXEL_BUDGET
    assert image_side(100_000) == 128
    wide = Image.new("RGB", (600, 300))
    assert pixels(shown(wide, 200))[1].shape == (100, 200, 3)
    assert wide.size == (600, 300)


def test_the_difference_has_no_sign_and_is_black_where_nothing_changed():
    first, second = Image.new("RGB", (2, 1), (10, 200, 5)), Image.new("RGB", (2, 1), (20, 100, 5))
    second.putpixel((1, 0), (10, 200, 5))
    for found in (difference(first, second), difference(second, first)):
        assert [found.getpixel((x, 0)) for x in (0, 1)] == [(40, 255, 0), (0, 0, 0)]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.2134, "0.213"), (-0.0004, "−4.0e−04"), (21.347, "21.35"), (-3.0, "−3.000"), (12345.6, "12346")],
)
def test_numbers_are_written_for_people(value, text):
    assert written(value) == text


def test_components_are_named_by_what_they_have():
    assert who({}) == "of one's own"
    assert (
        who({"kind": "local", "model": "m", "revision": "", "prompt_sha256": "ab" * 32})
        == "local, m, prompt abababababab…"
    )


def test_a_run_without_records_has_a_page(tmp_path):
    write_run(tmp_path, {"sources": {"kind": "generate"}}, [])
    page = Page(text_of(write_page(tmp_path)))
    assert "There are no records yet." in page.text and page.all("form") == [] and page.data["records"] == []


def test_an_older_page_survives_a_failed_one(tmp_path):
    run = make_run(tmp_path, ("kept_edit",), has_pair=False)
    path = Path(write_page(run))
    before = path.read_bytes()
    for shard in (run / "shards").glob("*.parquet"):
        shard.unlink()
    with pytest.raises(ValueError, match=r"\.parquet does not exist; expected every shard that has a mark"):
        write_page(run)
    assert path.read_bytes() == before


def test_a_folder_without_a_run_and_a_limit_without_sense_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no run of curation; expected a folder with manifest.json"):
        write_page(tmp_path)
    with pytest.raises(ValueError, match="max_records is 0; expected at least 1; leave it out for 400"):
        write_page(tmp_path, max_records=0)


def test_from_the_command_line(run, tmp_path, capsys):
    wanted = tmp_path / "page.html"
    assert main(["curate", "page", str(run), "--to", str(wanted), "--max-records", "2"]) == 0
    assert capsys.readouterr().out == f"{wanted}\n"
    assert len(Page(wanted.read_text("utf-8")).data["records"]) == 2
    assert main(["curate", "page", str(run), "--max-records", "0"]) == 2
    assert "max_records is 0; expected at least 1" in capsys.readouterr().err
    assert main(["curate", "page", str(tmp_path)]) == 2
    assert "holds no run of curation" in capsys.readouterr().err
