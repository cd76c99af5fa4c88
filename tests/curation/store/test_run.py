"""A run as a whole: whose shards are whose, what it says was made by what, and what it refuses."""

import json
from pathlib import Path

import pytest

from rpo.curation.store.address import Store
from rpo.curation.store.mark import STAGES, read_marks
from rpo.curation.store.run import CurationRun, Share, claim, identity_hash, share_of
from tests.curation.store.samples import made, shard


@pytest.mark.parametrize(
    ("shards", "environment", "expected"),
    [
        ("", {}, Share(0, 1)),
        ("", {"RANK": "2", "WORLD_SIZE": "3"}, Share(2, 3)),
        ("1/4", {"RANK": "2", "WORLD_SIZE": "3"}, Share(1, 4)),
    ],
)
def test_share(shards, environment, expected):
    assert share_of(shards, environment) == expected


@pytest.mark.parametrize("shards", ["1", "4/4", "a/b", "-1/2", "0/0"])
def test_a_share_that_there_is_not(shards):
    with pytest.raises(ValueError, match="write shards=0/4|expected 0 to"):
        share_of(shards, {})


def test_shares_divide_all_shards():
    owners = [[share for share in range(3) if Share(share, 3).owns(number)] for number in range(100)]
    assert all(len(one) == 1 for one in owners) and {one[0] for one in owners} == {0, 1, 2}


def test_a_folder_without_a_run_is_not_read(tmp_path):
    with pytest.raises(ValueError, match=r"holds no run of curation; expected a folder with manifest\.json"):
        CurationRun(tmp_path)


CRITIC = {"kind": "server", "model": "a", "prompt": "1" * 64}
BOTH = {"sources": {"kind": "folder"}, "critiques": CRITIC}


def begun(path: Path) -> Store:
    made(path, [shard(0, 0, ["a"], num_stages=2)], BOTH)
    return Store(path)


def again(store, identities, **changes):
    return claim(store, identities, (1, 1, 1), list(read_marks(store)), **changes)


def test_the_manifest_says_what_made_each_stage(tmp_path):
    store = begun(tmp_path)
    assert CurationRun(tmp_path).identities() == BOTH
    written = json.loads((tmp_path / "manifest.json").read_text())
    assert written["stages"]["critiques"]["sha256"] == identity_hash(CRITIC)
    assert (written["records"], written["shards"], written["shard"]) == (1, 1, 1)
    again(store, BOTH | {"edits": {"kind": "x"}})
    assert list(CurationRun(tmp_path).identities()) == ["sources", "critiques", "edits"]


def test_a_claim_of_the_same_writes_nothing(tmp_path):
    store = begun(tmp_path)
    before = (tmp_path / "manifest.json").stat().st_mtime_ns
    again(store, BOTH)
    assert (tmp_path / "manifest.json").stat().st_mtime_ns == before


def test_a_changed_template_is_refused_with_stage_key_and_hashes(tmp_path):
    store, changed = begun(tmp_path), CRITIC | {"prompt": "2" * 64}
    with pytest.raises(ValueError) as refused:
        again(store, BOTH | {"critiques": changed})
    message = str(refused.value)
    assert "stage 'critiques'" in message
    assert f"prompt was '{'1' * 64}' and is '{'2' * 64}'" in message
    assert identity_hash(CRITIC) in message and identity_hash(changed) in message
    assert "redo=critiques" in message


def test_a_stage_may_be_redone_and_counts_no_more_until_it_is(tmp_path):
    store, changed = begun(tmp_path), CRITIC | {"prompt": "2" * 64}
    again(store, BOTH | {"critiques": changed}, redo="critiques")
    assert [num_stages for _, num_stages in CurationRun(tmp_path).marks()] == [1]
    assert CurationRun(tmp_path).tally().done == {"sources": 1}
    (found,) = CurationRun(tmp_path).shards()
    assert found.rows["sources"] and not found.rows["critiques"]
    with pytest.raises(ValueError, match="stage 'sources' were made otherwise"):
        again(store, BOTH | {"sources": {"kind": "table"}}, redo="critiques")
    again(store, BOTH | {"sources": {"kind": "table"}}, redo="sources")
    assert list(CurationRun(tmp_path).marks()) == []


def test_a_stage_that_nothing_was_made_by_may_change(tmp_path):
    store = begun(tmp_path)
    again(store, BOTH | {"edits": {"kind": "x"}})
    again(store, BOTH | {"edits": {"kind": "y"}})
    assert CurationRun(tmp_path).identity_of("edits") == {"kind": "y"}


def test_another_cut_is_refused(tmp_path):
    store = begun(tmp_path)
    with pytest.raises(ValueError, match="shard is 2, and .* was begun with shards of 1; expected one way to cut"):
        claim(store, BOTH, (1, 1, 2), list(read_marks(store)))
    claim(store, BOTH, (5, 5, 1), list(read_marks(store)))
    assert CurationRun(tmp_path).manifest.records == 5


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"layout": 2, "stages": {"sources": {}}}'])
def test_a_damaged_manifest_is_named(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        CurationRun(tmp_path)
    (tmp_path / "manifest.json").write_text('{"layout": 9, "stages": {}}')
    with pytest.raises(ValueError, match="has layout 9; expected 2"):
        CurationRun(tmp_path)


def test_only_shards_of_the_plan_are_read(tmp_path):
    made(tmp_path, [shard(number, number, [f"{number}"]) for number in range(3)])
    store = Store(tmp_path)
    claim(store, CurationRun(tmp_path).identities(), (2, 2, 1), list(read_marks(store)))
    assert [found.ids for found in CurationRun(tmp_path).shards()] == [("0",), ("1",)]
    assert CurationRun(tmp_path).tally().done == dict.fromkeys(STAGES, 2)


def test_a_tally_is_the_sum_of_its_shards(tmp_path):
    made(tmp_path, [shard(0, 0, ["a", "b"]), shard(1, 2, ["c"], num_stages=3)])
    found = CurationRun(tmp_path).tally()
    assert found.done == {"sources": 3, "critiques": 3, "instructions": 3, "edits": 2, "scores": 2, "decisions": 2}
    assert found.faults == {"critiques": {"parse_error": 2}}
    assert found.kept == {"reward:bright": 2}
    assert found.evaluation == {"better": 2, "equal": 0, "worse": 0, "gap": 2.0}
