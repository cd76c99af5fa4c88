"""What a run is made with: whole in its file, and what differs is named."""

import json
from dataclasses import replace

import pytest

from rpo.errors import InputError
from rpo.training import made_with as module
from rpo.training.made_with import MADE_WITH, keep_made_with, made_with, read_made_with

NOW = made_with("DPORunConfig", {"chosen images": "a1", "beta": "150.0"})


def other(**changes):
    return replace(NOW, versions={**NOW.versions, "torch": "1.0"}, **changes)


def test_it_is_kept_and_read_back(tmp_path):
    keep_made_with(tmp_path, NOW)
    assert read_made_with(tmp_path) == NOW
    assert {"python", "rpo", "torch", "diffusers", "transformers", "peft"} <= NOW.versions.keys()
    assert NOW.differences(NOW) == {}


def test_what_differs_is_named():
    now = other(learns_from={"chosen images": "b2"})
    assert NOW.differences(now) == {
        "chosen images": "was a1, is b2",
        "beta": "was 150.0, is not told",
        "torch": f"was {NOW.versions['torch']}, is 1.0",
    }


def test_another_commit_of_the_same_files_is_no_difference():
    files, commits = "rpo's files", "rpo's commit"
    assert NOW.differences(replace(NOW, code={**NOW.code, commits: "other"})) == {}
    assert set(NOW.differences(replace(NOW, code={files: "other", commits: "other"}))) == {files, commits}


def test_a_run_that_is_continued_keeps_how_it_began(tmp_path):
    keep_made_with(tmp_path, NOW)
    keep_made_with(tmp_path, replace(NOW, learns_from={}))
    assert read_made_with(tmp_path) == NOW
    keep_made_with(tmp_path, other())
    keep_made_with(tmp_path, other())
    assert read_made_with(tmp_path) == replace(NOW, resumed_with=({"torch": f"was {NOW.versions['torch']}, is 1.0"},))


def test_every_file_of_the_package_counts(tmp_path, monkeypatch):
    package = tmp_path / "rpo" / "training"
    package.mkdir(parents=True)
    monkeypatch.setattr(module, "__file__", str(package / "made_with.py"))
    (package / "a.py").write_text("1")
    before = made_with("x", {}).code
    (package / "a.py").write_text("2")
    assert before["rpo's files"] != made_with("x", {}).code["rpo's files"]


@pytest.mark.parametrize("text", [None, "{", "{}", json.dumps({"settings": "x", "resumed_with": []})])
def test_a_folder_that_does_not_say_is_refused(text, tmp_path):
    if text is not None:
        (tmp_path / MADE_WITH).write_text(text)
    with pytest.raises(InputError, match=MADE_WITH):
        read_made_with(tmp_path)
