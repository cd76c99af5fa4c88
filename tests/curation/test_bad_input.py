"""Bad input: what ends a run before anything is spent, and what is the fault of one record and counted."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from rpo.curation.curate import curate
from rpo.curation.curate_config import SourceConfig
from rpo.curation.records import Critique, Edit, Fault, histories
from rpo.curation.score import Scorer, ToScore
from rpo.curation.store.mark import STAGES
from rpo.data.preference import encode_png
from rpo.data.writers import write_pairs
from tests.curation.fakes import (
    FakeCritic,
    FakeEditor,
    FakeInstructor,
    brightness,
    config_of,
    fakes,
    finished,
    image_folder,
    lines_of,
    picture,
)
from tests.data.samples import pair

COUNT = 30


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("source"), COUNT)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, source):
    return finished(config_of(tmp_path_factory.mktemp("undisturbed") / "run", source))


def write_lines(path, rows):
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def folder_with_text(path):
    image_folder(path, 3)
    (path / "001.txt").write_text(" \n")
    return SourceConfig(kind="folder", path=str(path)), r"^001\.png"


def folder_with_lines(path):
    image_folder(path, 2)
    write_lines(path, [{"file_name": "000.png", "caption": "fine"}, {"file_name": "001.png", "caption": ""}])
    return SourceConfig(kind="folder", path=str(path)), r"^metadata\.jsonl:2"


def table(path, captions):
    import datasets

    rows = {"image": [picture(index) for index in range(len(captions))], "caption": captions}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(path))
    return SourceConfig(kind="table", path=str(path)), rf"^{path} row 1"


def table_with_nothing(path):
    return table(path, ["fine", None])


def table_with_blanks(path):
    return table(path, ["fine", "  "])


def pairs_with_blanks(path):
    write_pairs(path, [pair(0), pair(1)])
    text = (path / "metadata.jsonl").read_text()
    (path / "metadata.jsonl").write_text(text.replace('"prompt 1"', '" "'))
    return SourceConfig(kind="pairs", path=str(path)), r"metadata\.jsonl:2"


def prompts_with_blanks(path):
    path.mkdir()
    (path / "prompts.jsonl").write_text('{"prompt": "a red circle"}\n{"prompt": " "}\n')
    return SourceConfig(prompts=str(path / "prompts.jsonl")), r"^prompts\.jsonl:2 of "


@pytest.mark.parametrize(
    "make",
    [
        folder_with_text,
        folder_with_lines,
        table_with_nothing,
        table_with_blanks,
        pairs_with_blanks,
        prompts_with_blanks,
    ],
)
def test_an_empty_caption_ends_the_run_before_anything_is_asked(tmp_path, make):
    source, name = make(tmp_path / "source")

    def refuse():
        raise AssertionError("the critic was asked")

    config = replace(config_of(tmp_path / "run", tmp_path), source=source)
    with pytest.raises(ValueError, match=rf"{name}.*(caption|prompt).*(empty|None)"):
        curate(config, components=fakes(critic=FakeCritic(before=refuse)))
    assert not (tmp_path / "run").exists()


def damaged(data, damage):
    return {"half": data[: len(data) // 2], "empty": b"", "no image": b"Hello!"}[damage]


def broken_folder(path, damage):
    victim = image_folder(path, 3) / "002.png"
    victim.write_bytes(damaged(victim.read_bytes(), damage))
    return SourceConfig(kind="folder", path=str(path)), r"^002\.png"


def broken_pairs(path, damage):
    write_pairs(path, [pair(0), pair(1)])
    victim = path / json.loads((path / "metadata.jsonl").read_text().splitlines()[1])["rejected_file_name"]
    victim.write_bytes(damaged(victim.read_bytes(), damage))
    return SourceConfig(kind="pairs", path=str(path)), r"metadata\.jsonl:2"


def broken_table(path, damage):
    import datasets

    whole = encode_png(np.asarray(picture(0)))
    rows = {"image": [{"bytes": whole}, {"bytes": damaged(whole, damage)}], "caption": ["a", "b"]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(path))
    return SourceConfig(kind="table", path=str(path)), rf"^{path} row 1"


@pytest.mark.parametrize("damage", ["half", "empty", "no image"])
@pytest.mark.parametrize("make", [broken_folder, broken_pairs, broken_table])
def test_an_unreadable_image_ends_the_run_before_anything_is_asked(tmp_path, make, damage):
    source, name = make(tmp_path / "source", damage)

    def refuse():
        raise AssertionError("the critic was asked")

    config = replace(config_of(tmp_path / "run", tmp_path), source=source, shard=1)
    with pytest.raises(ValueError, match=rf"{name}.*image.* cannot be (decoded|read)"):
        curate(config, components=fakes(critic=FakeCritic(before=refuse)))


class Answering(FakeCritic):
    """A critic that says what it is told to."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def one(self, image):
        return self.answer


@pytest.mark.parametrize(
    ("answer", "kind"), [(None, "empty"), ("A lovely picture.", "invalid"), ({"overall": 3}, "invalid"), (7, "invalid")]
)
def test_a_critic_that_gives_something_else_is_a_counted_fault(source, tmp_path, answer, kind):
    folder = finished(config_of(tmp_path / "run", source), critic=Answering(answer))
    found = list(histories(folder))
    assert {one.critique.kind for one in found} == {kind}
    assert {one.outcomes[0].reason for one in found} == {"critique_fault"}
    assert answer is None or {one.critique.raw for one in found} == {str(answer)}


def test_a_critic_that_gives_ten_megabytes_fills_no_disk(source, tmp_path):
    folder = finished(config_of(tmp_path / "run", source), critic=Answering("x" * 10_000_000))
    assert sum(path.stat().st_size for path in folder.store.folder.rglob("*") if path.is_file()) < COUNT * 21_000


class Mute(FakeInstructor):
    """An instructor that gives what it is told to."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def __call__(self, images, captions, critiques):
        return [self.answer] * len(images)


class Scribbler(FakeEditor):
    """An editor that gives what it is told to."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def one(self, image, seed):
        return self.answer


@pytest.mark.parametrize(
    ("component", "answer", "kind"),
    [
        (Mute, None, "empty"),
        (Mute, "make it red", "invalid"),
        (Mute, Critique(problems=(), overall=10), "invalid"),
        (Scribbler, None, "empty"),
        (Scribbler, np.zeros((10, 12, 3), np.uint8), "invalid"),
        (Scribbler, Image.new("L", (12, 10)), "invalid"),
    ],
)
def test_instructors_and_editors_that_give_something_else_are_counted_faults(
    undisturbed, source, tmp_path, component, answer, kind
):
    name, field = ("instructor", "instructions") if component is Mute else ("editor", "edit")
    folder = finished(config_of(tmp_path / "run", source), **{name: component(answer)})
    found = [vars(one)[field] for one in histories(folder)]
    before = [vars(one)[field] for one in histories(undisturbed)]
    assert [one is None for one in found] == [one is None for one in before]
    assert {one.kind for one in found if one is not None} == {kind}


class Clumsy(FakeEditor):
    """An editor with which one image goes wrong."""

    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong

    def __call__(self, images, instructions, seeds):
        if any(seed % 7 == 0 for seed in seeds) and self.wrong == "raises":
            raise RuntimeError("cannot edit this")
        edits = super().__call__(images, instructions, seeds)
        if self.wrong == "size":
            edits[0] = picture(0, (5, 5))
        return edits


def test_an_editor_that_raises_on_some_images_loses_only_those(undisturbed, source, tmp_path):
    folder = finished(config_of(tmp_path / "run", source), editor=Clumsy("raises"))
    faulty = [one for one in histories(folder) if isinstance(one.edit, Fault)]
    whole = [one for one in histories(undisturbed) if isinstance(one.edit, Edit)]
    assert {one.source.id for one in faulty} == {one.source.id for one in whole if one.edit.seed % 7 == 0}
    assert faulty
    assert {one.edit.message for one in faulty} == {"RuntimeError: cannot edit this"}
    ids = {one.source.id for one in faulty}
    lines, before = lines_of(folder.store.address), lines_of(undisturbed.store.address)
    for stage in STAGES:
        others = [[line for line in some[stage] if json.loads(line)["id"] not in ids] for some in (lines, before)]
        assert others[0] == others[1], "the others are as they would have been"
    assert {one.outcomes[0].reason for one in faulty} == {"edit_fault"}


def test_an_edit_of_another_size_is_a_fault(source, tmp_path):
    folder = finished(config_of(tmp_path / "run", source), editor=Clumsy("size"))
    faults = [one.edit for one in histories(folder) if isinstance(one.edit, Fault)]
    assert faults
    assert {fault.message for fault in faults} == {"the edit is RGB 5x5; expected RGB 12x10, as its source is"}


VALUES = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}


def sometimes(value):
    """A reward that has no number for some captions."""

    def reward(images, prompts):
        scores = images.mean((1, 2, 3))
        for index, prompt in enumerate(prompts):
            if prompt.endswith("3"):
                scores[index] = value
        return scores

    return reward


sometimes_nan, sometimes_inf, sometimes_minus_inf = map(sometimes, VALUES.values())


@pytest.mark.parametrize("name", ["sometimes_nan", "sometimes_inf", "sometimes_minus_inf"])
@pytest.mark.parametrize("is_filter", [True, False])
def test_a_score_that_is_no_number_is_that_records_fault(undisturbed, source, tmp_path, name, is_filter):
    base, place = config_of(tmp_path / "run", source), f"{__name__}:{name}"
    rules = replace(base.decide, rewards={place: 0.0}) if is_filter else base.decide
    folder = finished(replace(base, decide=rules, evaluation="" if is_filter else place))
    faulty = [one for one in histories(folder) if isinstance(one.scores, Fault)]
    scored = [one for one in histories(undisturbed) if one.scores is not None]
    assert {one.source.id for one in faulty} == {one.source.id for one in scored if one.source.caption.endswith("3")}
    assert faulty
    assert {one.scores.kind for one in faulty} == {"invalid"}
    assert {one.outcomes[0].reason for one in faulty} == {"score_fault"}
    assert all((name if is_filter else "evaluation") in one.scores.message for one in faulty)


def test_a_similarity_that_is_no_number_is_that_records_fault():
    items = [ToScore("a", picture(0), picture(1)), ToScore("b", picture(0), picture(2)), ToScore("c", picture(0), None)]
    answers = iter([0.5, float("nan")])
    scorer = Scorer({"brightness": brightness}, None, lambda pairs: [next(answers) for _ in pairs])
    good, bad, unedited = scorer(items)
    assert good.similarity == 0.5 and unedited.similarity is None
    assert bad == Fault("invalid", "the similarity of source and edit is nan; expected a finite number")
