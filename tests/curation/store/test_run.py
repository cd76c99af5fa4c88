"""The folder of a run: its lines, its images, its locks, and what it says was done."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rpo.curation.store.folder import Share, identity_hash, share_of


def picture(seed=0, size=(8, 6)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def test_images_are_named_by_content_and_come_back(tmp_path):
    folder = Run(tmp_path, Share())
    digest = folder.save_image(picture())
    assert folder.save_image(picture()) == digest
    assert [path.name for path in (tmp_path / "images").iterdir()] == [f"{digest}.png"]
    assert np.array_equal(np.asarray(folder.load_image(digest, "record a")), np.asarray(picture()))


def test_a_damaged_or_missing_image_names_the_record(tmp_path):
    folder = Run(tmp_path, Share())
    digest = folder.save_image(picture())
    path = folder.image_path(digest)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=rf"^record a: the image .*{digest}.png cannot be decoded"):
        folder.load_image(digest, "record a")
    path.unlink()
    with pytest.raises(ValueError, match=rf"^record a: the image .*{digest}.png does not exist; expected every image"):
        folder.load_image(digest, "record a")


def test_a_folder_without_a_run_is_not_read(tmp_path):
    with pytest.raises(ValueError, match=r"holds no run of curation; expected a folder with manifest\.json"):
        Run(tmp_path)


@pytest.mark.parametrize(
    ("part", "environment", "expected"),
    [
        ("", {}, Share(0, 1)),
        ("", {"RANK": "2", "WORLD_SIZE": "3"}, Share(2, 3)),
        ("1/4", {"RANK": "2", "WORLD_SIZE": "3"}, Share(1, 4)),
    ],
)
def test_share(part, environment, expected):
    assert share_of(part, environment) == expected


@pytest.mark.parametrize("part", ["1", "4/4", "a/b", "-1/2", "0/0"])
def test_a_share_that_there_is_not(part):
    with pytest.raises(ValueError, match="write part=0/4|expected 0 to"):
        share_of(part, {})


def test_shares_divide_all_groups():
    groups = [f"{index * 7919:016x}" for index in range(100)]
    owners = [[share for share in range(3) if Share(share, 3).owns(group)] for group in groups]
    assert all(len(one) == 1 for one in owners)
    assert {one[0] for one in owners} == {0, 1, 2}


def test_a_part_is_held_by_one_and_a_split_by_its_own(tmp_path):
    first = Run(tmp_path, Share(0, 2))
    with pytest.raises(ValueError, match=rf"part 0 of 2 of {tmp_path} is in use by process {os.getpid()} on "):
        Run(tmp_path, Share(0, 2))
    second = Run(tmp_path, Share(1, 2))
    with pytest.raises(ValueError, match=r"in 2 parts are at work, and part 2 of 3 has records in common"):
        Run(tmp_path, Share(2, 3))
    first.close()
    second.close()
    Run(tmp_path, Share(2, 3)).close()
    Run(tmp_path, Share(0, 2)).close()


def test_nothing_is_left_of_a_run_that_never_began(tmp_path):
    Run(tmp_path / "new", Share()).close()
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    Run(tmp_path / "mine", Share()).close()
    assert (tmp_path / "mine").is_dir(), "it was there before"
    Run(tmp_path / "shared", Share(0, 2)).close()
    assert (tmp_path / "shared").is_dir(), "the other part may be at work"
    begun(tmp_path / "begun")
    assert Run(tmp_path / "begun").identities()


CRITIC = {"kind": "server", "model": "a", "prompt": "1" * 64}


def begun(path: Path) -> None:
    folder = Run(path, Share())
    folder.claim({"sources": {"kind": "folder"}, "critiques": CRITIC})
    folder.stages["sources"].append({"id": "a"})
    folder.stages["critiques"].append({"id": "a"})
    folder.close()


def test_the_manifest_says_what_made_each_stage(tmp_path):
    begun(tmp_path)
    assert Run(tmp_path).identities() == {"sources": {"kind": "folder"}, "critiques": CRITIC}
    written = json.loads((tmp_path / "manifest.json").read_text())
    assert written["stages"]["critiques"]["sha256"] == identity_hash(CRITIC)
    begun_again = Run(tmp_path, Share())
    begun_again.claim({"sources": {"kind": "folder"}, "critiques": CRITIC, "edits": {"kind": "x"}})
    assert list(Run(tmp_path).identities()) == ["sources", "critiques", "edits"]


def test_a_changed_template_is_refused_with_stage_key_and_hashes(tmp_path):
    begun(tmp_path)
    changed = CRITIC | {"prompt": "2" * 64}
    with pytest.raises(ValueError) as refused:
        Run(tmp_path, Share()).claim({"sources": {"kind": "folder"}, "critiques": changed})
    message = str(refused.value)
    assert "stage 'critiques'" in message
    assert f"prompt was '{'1' * 64}' and is '{'2' * 64}'" in message
    assert identity_hash(CRITIC) in message
    assert identity_hash(changed) in message
    assert "delete the folder 'critiques' and those of the stages after it" in message


def test_a_stage_may_be_done_anew_if_those_after_it_are(tmp_path):
    begun(tmp_path)
    (tmp_path / "sources/part-0.jsonl").unlink()
    folder = Run(tmp_path, Share())
    with pytest.raises(ValueError, match="'sources' is to be done anew with other settings, but 'critiques' still has"):
        folder.claim({"sources": {"kind": "table"}, "critiques": CRITIC})
    folder.close()
    (tmp_path / "critiques/part-0.jsonl").unlink()
    Run(tmp_path, Share()).claim({"sources": {"kind": "table"}, "critiques": CRITIC})
    assert Run(tmp_path).identities()["sources"] == {"kind": "table"}


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"layout": 1, "stages": {"sources": {}}}'])
def test_a_damaged_manifest_is_named(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        Run(tmp_path).identities()
    (tmp_path / "manifest.json").write_text('{"layout": 9, "stages": {}}')
    with pytest.raises(ValueError, match="has layout 9; expected 1"):
        Run(tmp_path).identities()
