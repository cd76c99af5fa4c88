"""Whole runs: what is recorded, what a shared run comes to, and what is refused before anything is spent."""

import os
import signal
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest

from rpo.curation.curate import curate
from rpo.curation.curate_config import EditorConfig
from rpo.curation.export import export
from rpo.curation.records import Critique, Edit, Fault, Unavailable, histories, history_of, image_of, result_of
from rpo.curation.status import status_of
from rpo.curation.store.address import Store
from rpo.curation.store.mark import read_marks
from rpo.curation.store.run import CurationRun
from rpo.data.readers import read_pairs
from rpo.errors import InputError
from rpo.interrupts import Terminated
from tests.curation.fakes import (
    FakeCritic,
    FakeEditor,
    Hook,
    config_of,
    fakes,
    finished,
    image_folder,
    in_child,
    lines_of,
    sealed,
    threaded,
    whole,
)
from tests.run_state import assert_refused

COUNT = 30


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("source"), COUNT)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, source):
    return finished(config_of(tmp_path_factory.mktemp("undisturbed") / "run", source))


def test_every_record_has_its_history_and_an_outcome(undisturbed, source):
    found = list(histories(undisturbed))
    assert [one.source.caption for one in found] == [f"caption {index}" for index in range(COUNT)]
    assert [one.source.order for one in found] == list(range(COUNT))
    reasons = Counter(one.outcomes[0].reason for one in found)
    assert reasons[None] >= 5
    assert {"nothing_to_fix", "critique_fault", "no_instructions"} <= set(reasons)
    for one in found:
        assert (one.edit is None) == (one.instructions is None or one.instructions.is_empty)
        if isinstance(one.edit, Edit):
            assert image_of(undisturbed, one, "edit").size == image_of(undisturbed, one, "source").size
            (outcome,) = one.outcomes
            scores = one.scores
            gap = scores.edit["tests.curation.fakes:brightness"] - scores.source["tests.curation.fakes:brightness"]
            if outcome.reason is None:
                assert outcome.chosen.endswith("/edit" if gap > 0 else "/source")
    faulty = next(one for one in found if isinstance(one.critique, Fault))
    assert faulty.critique.raw == "It is a lovely picture."


def test_two_processes_share_a_folder_without_duplicates(undisturbed, source, tmp_path):
    config = config_of(tmp_path / "run", source)
    runs = [partial(curate, replace(config, shards=f"{share}/2"), components=fakes()) for share in range(2)]
    assert in_child(*runs) == [0, 0]
    assert lines_of(tmp_path / "run") == lines_of(undisturbed.store.address)


def test_a_run_of_two_processes_is_gone_on_with_by_one(undisturbed, source, tmp_path):
    config = config_of(tmp_path / "run", source)
    in_child(partial(curate, replace(config, shards="1/2"), components=fakes(editor=FakeEditor(before=Hook(2)))))
    curate(config, resume=True, components=fakes())
    assert lines_of(tmp_path / "run") == lines_of(undisturbed.store.address)


def test_the_environment_of_torchrun_divides_the_records(source, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    finished(config_of(tmp_path / "run", source))
    assert sealed(tmp_path / "run") == [1]


def test_threads_give_the_same_records(undisturbed, source, tmp_path):
    config = config_of(tmp_path / "run", source)
    curate(config, components=threaded())
    assert lines_of(tmp_path / "run") == lines_of(undisturbed.store.address)


def test_a_used_folder_is_not_overwritten(undisturbed, source):
    with pytest.raises(ValueError, match="holds a run already; give --resume"):
        curate(config_of(undisturbed.store.address, source), components=fakes())


def test_a_finished_run_asks_nobody_again(undisturbed, source):
    before = lines_of(undisturbed.store.address)

    def refuse():
        raise AssertionError("asked again")

    asked = fakes(critic=FakeCritic(before=refuse), editor=FakeEditor(before=refuse))
    curate(config_of(undisturbed.store.address, source), resume=True, components=asked)
    assert lines_of(undisturbed.store.address) == before


def test_a_changed_prompt_in_a_resumed_run_is_refused(undisturbed, source):
    changed = FakeCritic(identity={"kind": "fake", "model": "eye", "prompt_sha256": "9"})
    with pytest.raises(ValueError, match=r"stage 'critiques' were made otherwise: prompt_sha256 was '1' and is '9'"):
        curate(config_of(undisturbed.store.address, source), resume=True, components=fakes(critic=changed))


def test_decisions_can_be_made_anew_by_other_rules(source, tmp_path):
    config = config_of(tmp_path / "run", source)
    curate(config, components=fakes())
    other = replace(config, decide=replace(config.decide, policy="keep_improved"))
    with pytest.raises(ValueError, match="policy was 'both_directions' and is 'keep_improved'"):
        curate(other, resume=True, components=fakes())
    curate(replace(other, redo="decisions"), resume=True, components=fakes())
    curate(other, resume=True, components=fakes(critic=FakeCritic(before=raising)))
    reasons = Counter(one.outcomes[0].reason for one in histories(CurationRun(config.output)))
    assert reasons["got_worse"] > 0


def test_a_run_may_stop_after_a_stage_and_go_on_later(undisturbed, source, tmp_path):
    config = config_of(tmp_path / "run", source)
    curate(replace(config, stop_after="instructions"), components=replace(fakes(), editor=None))
    assert status_of(config.output).stages[3].done == 0
    curate(config, resume=True, components=fakes())
    assert lines_of(tmp_path / "run") == lines_of(undisturbed.store.address)


def test_a_server_that_is_gone_stops_the_run_and_costs_nothing_else(undisturbed, source, tmp_path):
    calls = []

    def fail_later():
        calls.append(0)
        if len(calls) == 4:
            raise Unavailable("no answer from http://localhost:9")

    config = config_of(tmp_path / "run", source)
    with pytest.raises(Unavailable, match="no answer"):
        curate(config, components=fakes(critic=FakeCritic(before=fail_later)))
    assert [len(mark.stages) for mark in read_marks(Store(config.output))] == [6, 1, 1, 1]
    curate(config, resume=True, components=fakes())
    assert lines_of(tmp_path / "run") == lines_of(undisturbed.store.address)


def raising(images, prompts):
    """A reward that is broken."""
    raise OSError("no weights")


def test_a_reward_that_raises_stops_the_run(source, tmp_path):
    base = config_of(tmp_path / "run", source)
    broken = replace(base, decide=replace(base.decide, rewards={"tests.curation.test_curate:raising": 0.0}))
    with pytest.raises(ValueError, match="raised OSError: no weights"):
        curate(broken, components=fakes())
    assert status_of(base.output).stages[4].done == 0


@pytest.mark.parametrize(
    ("rewards", "evaluation"),
    [
        ({"shapes": 0.0}, "shapes"),
        ({"jpeg-compressibility": 0.0, "shapes": 0.0}, "shapes-strict"),
        ({"rpo.shapes.reward:STRICT": 0.0}, "shapes"),
        ({"rpo.rewards.jpeg:COMPRESSIBILITY": 0.0}, "jpeg-compressibility"),
        ({"http://host:1/shapes?seconds=3": 0.0}, "shapes-strict"),
        ({"jpeg-compressibility": 0.0}, "https://host/jpeg-compressibility"),
    ],
)
def test_the_reward_that_evaluates_must_not_filter(source, tmp_path, rewards, evaluation):
    base = config_of(tmp_path / "run", source)
    config = replace(base, evaluation=evaluation, decide=replace(base.decide, rewards=rewards))
    with pytest.raises(ValueError, match=r"filters, and .* evaluates, which is the same judge; expected two"):
        curate(config, components=fakes())
    assert not os.path.exists(base.output)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": {}}, "sets 'rewards' to {}, but a mapping .* that is not empty is needed"),
        ({"rewards": {"tests.curation.fakes:brightness": -1.0}}, "to -1.0, but a number"),
        ({"min_distance": 0.5}, r"decide\.min_distance is 0\.5 and decide\.max_distance 0\.3"),
        ({"orderings": "all"}, "orderings is 'all', and source.kind 'folder'; expected given pairs"),
    ],
)
def test_rules_that_nothing_can_meet_are_refused(source, tmp_path, changes, message):
    base = config_of(tmp_path / "run", source)
    with pytest.raises(ValueError, match=message):
        curate(replace(base, decide=replace(base.decide, **changes)), components=fakes())


def test_a_damaged_shard_is_named_and_done_again_without_its_mark(undisturbed, source, tmp_path):
    config = config_of(tmp_path / "run", source)
    curate(replace(config, stop_after="sources"), components=fakes())
    victim = next((tmp_path / "run/shards").glob("0000001.*.parquet"))
    victim.write_bytes(victim.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"0000001\..*\.parquet is not what its mark says.*delete .*0000001\.json"):
        curate(config, resume=True, components=fakes())
    (tmp_path / "run/shards/0000001.json").unlink()
    curate(config, resume=True, components=fakes())
    assert lines_of(tmp_path / "run") == lines_of(undisturbed.store.address)


def test_instructions_may_be_asked_for_sound_images_too(undisturbed, source, tmp_path):
    folder = finished(replace(config_of(tmp_path / "run", source), instruct_sound=True))
    sound = [one.critique for one in histories(undisturbed) if one.outcomes[0].reason == "nothing_to_fix"]
    assert all(isinstance(one, Critique) and one.nothing_to_fix for one in sound)
    told = [len(whole(run.store.address).rows["instructions"]) for run in (folder, undisturbed)]
    assert told[0] == told[1] + len(sound)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_told_to_end_keeps_what_it_has_and_goes_on(undisturbed, source, tmp_path, number):
    config, calls = config_of(tmp_path / "run", source), []

    def end_later():
        calls.append(0)
        if len(calls) == 4:
            signal.raise_signal(number)

    with pytest.raises(Terminated):
        curate(config, components=fakes(editor=FakeEditor(before=end_later)))
    assert signal.getsignal(number) == signal.SIG_DFL
    assert sealed(tmp_path / "run") == [0, 1, 2, 3]
    curate(config, resume=True, components=fakes())
    assert lines_of(tmp_path / "run") == lines_of(undisturbed.store.address)


def test_a_refused_resume_changes_nothing(source, tmp_path):
    config = config_of(tmp_path / "run", source)
    curate(config, components=fakes())
    rewards = replace(config.decide, rewards={"tests.curation.fakes:greenness": 0.0})
    cases = {
        "stage 'critiques' were made otherwise: model was 'eye' and is 'nose'": (
            config,
            fakes(critic=FakeCritic(identity={"kind": "fake", "model": "nose", "prompt_sha256": "1"})),
        ),
        "stage 'scores' were made otherwise: .*brightness": (replace(config, decide=rewards, evaluation=""), fakes()),
        "stage 'edits' were made otherwise: seed was '0' and is '5'": (
            replace(config, editor=replace(config.editor, seed=5)),
            fakes(),
        ),
    }
    for message, (other, components) in cases.items():
        assert_refused(tmp_path / "run", message, partial(curate, other, resume=True, components=components))
    assert_refused(tmp_path / "run", "holds a run already", partial(curate, config, components=fakes()))


def test_several_edits_of_an_image_are_ordered_and_become_pairs_for_an_editor(tmp_path):
    config = config_of(tmp_path / "run", image_folder(tmp_path / "source", 12))
    one, several = finished(config), replace(config, output=str(tmp_path / "several"))
    folder = finished(replace(several, editor=EditorConfig(edits_per_image=4)))
    alone, together = whole(one.store.address), whole(folder.store.address)
    for record in alone.rows["edits"]:
        first, others = (run.rows["edits"][record] for run in (alone, together))
        if "fault" in first:
            continue
        assert first["image"] == others["image"]  # what was there alone is the first of several
        scores = result_of(together, "scores", record)
        marks = [one["tests.curation.fakes:brightness"] for one in (scores.edit, *scores.others)]
        ranked = sorted(range(4), key=lambda number: -marks[number])
        names = [f"{record}/edit" + (f"-{number}" if number else "") for number in ranked]
        own, *among = result_of(together, "decisions", record)
        assert {own.first, own.second} == {f"{record}/source", f"{record}/edit"}
        assert [(two.chosen, two.rejected) for two in among] == [(names[0], names[3]), (names[1], names[2])]
    pairs = list(read_pairs(export(folder.store.address, "edits").path))
    edited = [row for row in together.rows["edits"].values() if "image" in row]
    assert len(pairs) == 2 * len(edited) > 0
    for pair in pairs:
        history = history_of(together, str(pair.details["record"]))
        assert pair.prompt == history.instructions.text
        assert pair.facts("original").digest == history.source.image
        assert pair.margin > 0
        assert pair.details["chosen_is"] == pair.details["rejected_is"] == "edit"


def test_pairs_for_an_editor_need_several_edits(tmp_path):
    folder = finished(config_of(tmp_path / "run", image_folder(tmp_path / "source", 6)))
    with pytest.raises(InputError, match="edits_per_image: 2 or more"):
        export(folder.store.address, "edits")
