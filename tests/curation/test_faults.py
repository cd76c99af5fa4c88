"""A component that raises on everything stops the run; one that raises on some records loses these."""

from dataclasses import dataclass

import pytest

from rpo.curation.curate import curate
from rpo.curation.faults import PATIENCE, ask_each, broken, in_words
from rpo.curation.records import Fault
from rpo.curation.status import status_of
from rpo.curation.store.mark import STAGES
from tests.curation.fakes import (
    FakeCritic,
    FakeEditor,
    FakeInstructor,
    config_of,
    fakes,
    finished,
    image_folder,
    lines_of,
)
from tests.curation.test_pipeline import Notes, Sealed, run, stage


class Moody:
    """Raises on some records, says nonsense of others, and remembers whom it was asked about."""

    def __init__(self, raises, nonsense=()):
        self.raises, self.nonsense, self.asked = set(raises), set(nonsense), []

    def __call__(self, items):
        self.asked += items
        if found := self.raises.intersection(items):
            raise RuntimeError(f"cannot look at {max(found)}")
        return [Fault("parse_error", "no JSON", "prose") if one in self.nonsense else one for one in items]


IDS = [f"{index:02}" for index in range(5 * PATIENCE)]


def in_shards(ids, size):
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def kinds(records):
    return {one: records[one].get("fault", {}).get("kind") for one in records}


@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.parametrize("shard", [PATIENCE, 100])
@pytest.mark.parametrize("num_answered", [0, 5])
def test_what_raises_on_one_record_after_the_other_stops_the_run(shard, concurrency, num_answered):
    broken = Moody(IDS[num_answered:])
    first = stage("critiques", broken, batch_size=1, concurrency=concurrency, component="the critic (kind own)")
    message = (
        r"^stage 'critiques': the critic \(kind own\) raised on \d+ items in a row, the last time with "
        r"'RuntimeError: cannot look at \d+'; expected an answer.* --resume"
    )
    with pytest.raises(ValueError, match=message):
        run([first, stage("decisions")], in_shards(IDS, shard))
    # What was in flight, and what threads took up before this one, on a busy machine, had heard of the last fault.
    more = 1 if concurrency == 1 else 4 * concurrency
    most = PATIENCE if shard > PATIENCE or not num_answered else 2 * PATIENCE  # of each shard anew
    assert PATIENCE <= len(broken.asked) - num_answered <= most + more


@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.parametrize("shard", [20, 100])
@pytest.mark.parametrize("nonsense", [True, False])
def test_an_answer_after_fewer_says_that_the_records_were_at_fault(shard, concurrency, nonsense):
    """An answer in no form at all is one: the model's own."""
    odd, first_answer, later = IDS[: PATIENCE - 3], IDS[PATIENCE - 3], IDS[-PATIENCE + 3 :]
    moody = Moody([*odd, *later], [first_answer] if nonsense else [])
    seen, notes = [], Notes()
    stages = [
        stage("critiques", moody, batch_size=1, concurrency=concurrency),
        stage("decisions", lambda items: seen.extend(items) or items),
    ]
    records = run(stages, in_shards(IDS, shard), notes)
    expected = dict.fromkeys(IDS) | dict.fromkeys([*odd, *later], "raised")
    expected[first_answer] = "parse_error" if nonsense else None
    assert kinds(records["critiques"]) == expected
    assert sorted(seen) == IDS
    assert notes.faults["critiques"] == len(odd) + len(later) + nonsense


def test_a_batch_in_which_the_last_one_is_answered_is_no_row_of_exceptions():
    records = run([stage("critiques", Moody(IDS[:-1]), batch_size=len(IDS))], [IDS])
    assert list(kinds(records["critiques"]).values()).count("raised") == len(IDS) - 1


@pytest.mark.parametrize(("number", "words"), [(1, "the only item that there is"), (3, "all 3 items that there are")])
def test_fewer_records_than_the_patience_that_all_raise_stop_the_run(number, words):
    with pytest.raises(ValueError, match=rf"^stage 'critiques': the component raised on {words}, the last time"):
        run([stage("critiques", Moody(IDS)), stage("edits")], in_shards(IDS[:number], 5))


def test_the_last_few_may_raise_if_others_were_answered_before():
    records = run([stage("critiques", Moody(IDS[2:5]), batch_size=1)], [IDS[:2], IDS[2:5]])
    assert kinds(records["critiques"]) == dict.fromkeys(IDS[:2]) | dict.fromkeys(IDS[2:5], "raised")
    again = run([stage("critiques", Moody(IDS))], [IDS[2:5]], answered={"critiques"})
    assert kinds(again["critiques"]) == dict.fromkeys(IDS[2:5], "raised")


def test_a_shard_is_not_sealed_after_the_stage_that_broke():
    sealed = Sealed()
    with pytest.raises(ValueError, match="in a row"):
        run([stage("sources"), stage("critiques", Moody(IDS))], [IDS[:20]], sealed=sealed)
    assert sealed.through == {0: 1} and sealed["critiques"] == {}


def test_a_component_in_words():
    assert in_words("editor", {"model": "brush", "seed": "3"}) == "the editor (model brush)"
    assert in_words("judge", {"orders": "both"}) == "the judge"


def test_a_long_answer_of_a_server_is_shown_in_part():
    fault = Fault("raised", "the server failed at this question: ValueError", raw="<html>" + "x" * 1000)
    assert "with 'the server failed at this question: ValueError: <html>" + "x" * 294 + "'; expec" in str(
        broken("the critic", fault, "everything")
    )


def test_answers_for_another_number_of_items_are_refused():
    with pytest.raises(ValueError, match="gave 1 answers for 2 items"):
        ask_each(lambda items: items[:1], ["a", "b"])


def fail():
    raise RuntimeError("no weights")


NUM_IMAGES = 60
BROKEN = [
    ("critic", FakeCritic(before=fail), "critiques", "eye"),
    ("instructor", FakeInstructor(before=fail), "instructions", "pen"),
    ("editor", FakeEditor(before=fail), "edits", "brush"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("source"), NUM_IMAGES)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, source):
    return finished(config_of(tmp_path_factory.mktemp("undisturbed") / "run", source, shard=NUM_IMAGES)).store.address


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_component_stops_the_run_and_once_mended_it_ends_as_an_undisturbed_one(
    undisturbed, source, tmp_path, case
):
    name, broken, stage_name, model = case
    config = config_of(tmp_path / "run", source, shard=NUM_IMAGES)
    for resume in (False, True):  # to try again without mending changes nothing
        message = rf"^stage '{stage_name}': the {name} \(kind fake, model {model}\) raised on \d+ items in a row"
        with pytest.raises(ValueError, match=message):
            curate(config, resume=resume, components=fakes(**{name: broken}))
        done = {one.name: one.done for one in status_of(config.output).stages}
        assert done[stage_name] == done["decisions"] == 0
        assert done["sources"] == NUM_IMAGES, "what was whole before is kept"
    curate(config, resume=True, components=fakes())
    assert lines_of(tmp_path / "run") == lines_of(undisturbed)


@dataclass
class Breaking:
    """Raises from its third call on."""

    calls: int = 0

    def __call__(self):
        self.calls += 1
        if self.calls > 2:
            raise RuntimeError("no memory of its own")


@pytest.mark.parametrize("case", BROKEN)
def test_a_component_that_breaks_at_work_costs_nothing_that_was_sealed(undisturbed, source, tmp_path, case):
    name, broken, stage_name, _ = case
    config = config_of(tmp_path / "run", source, shard=NUM_IMAGES)
    with pytest.raises(ValueError, match=rf"stage '{stage_name}': the {name} .* items in a row"):
        curate(config, components=fakes(**{name: type(broken)(before=Breaking())}))
    before = next((tmp_path / "run/shards").glob("*.parquet"))
    assert STAGES.index(stage_name) == [one.done > 0 for one in status_of(config.output).stages].count(True)
    curate(config, resume=True, components=fakes())
    assert lines_of(tmp_path / "run") == lines_of(undisturbed)
    assert not before.exists(), "of each shard there is one file"


def test_a_source_of_one_image_that_raises_stops_the_run(tmp_path):
    config = config_of(tmp_path / "run", image_folder(tmp_path / "one", 1))
    with pytest.raises(ValueError, match="raised on the only item that there is, the last time with 'RuntimeError: no"):
        curate(config, components=fakes(critic=FakeCritic(before=fail)))
