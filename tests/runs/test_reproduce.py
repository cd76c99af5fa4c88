"""`rpo reproduce`: equal weights, bit for bit, or what differs, by name and before the run starts."""

import json
import shutil

import pytest

from rpo.adapters.lora_file import WEIGHT_FILE
from rpo.cli.main import main
from rpo.data.writers import write_pairs
from rpo.errors import InputError
from rpo.runs import reproduce as module
from rpo.runs.reproduce import compare, reproduce
from rpo.training.made_with import MADE_WITH
from tests.runs.test_quickstart import quickstart
from tests.runs.test_train import inputs, words  # noqa: F401 - a fixture
from tests.trainers.pair_runs import toy_pairs


@pytest.fixture(scope="module", params=["dpo", pytest.param("endpoint", marks=pytest.mark.slow)])
def finished(request, inputs, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp(request.param) / "run"
    assert main(words(request.param, inputs, "epsilon", folder)) == 0
    return folder


def lora(folder):
    return (folder / "lora" / WEIGHT_FILE).read_bytes()


def kept(folder):
    """Every file but the caches, which close when they are collected."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "cache" not in path.parts}


def test_a_training_is_repeated_to_the_bit(finished, tmp_path, capsys):
    before = kept(finished)
    assert main(["reproduce", str(finished), "--check"]) == 0
    assert "nothing" in capsys.readouterr().out
    assert main(["reproduce", str(finished), "--output", str(tmp_path / "again")]) == 0
    assert capsys.readouterr().out.endswith("equal weights\n")
    assert lora(tmp_path / "again") == lora(finished)
    assert kept(finished) == before
    assert main(["reproduce", str(finished), "--output", str(tmp_path / "again")]) == 2  # which holds a run
    assert main(["reproduce", str(tmp_path / "again"), "--check"]) == 0


@pytest.mark.slow
def test_rounds_are_repeated_to_the_bit(tmp_path, capsys):
    folder = tmp_path / "quickstart"
    assert quickstart(folder) == 0
    capsys.readouterr()
    assert main(["reproduce", str(folder)]) == 0
    assert capsys.readouterr().out.endswith("equal weights\n")
    assert lora(tmp_path / "quickstart-reproduced") == lora(folder)


def test_a_changed_data_set_is_named_before_the_run_starts(inputs, tmp_path, capsys):  # noqa: F811
    shutil.copytree(inputs, tmp_path / "in")
    few = ["learning.updates=1", "preview_every=0", "report=false", "preflight=false"]
    assert main([*words("dpo", tmp_path / "in", "epsilon", tmp_path / "run"), *few]) == 0
    shutil.rmtree(tmp_path / "in" / "pairs")
    write_pairs(tmp_path / "in" / "pairs", list(reversed(toy_pairs())))
    assert set(compare(tmp_path / "run")) == {"prompts of the pairs", "chosen images", "rejected images"}
    capsys.readouterr()
    assert main(["reproduce", str(tmp_path / "run")]) == 1
    first, _, rest = capsys.readouterr().out.partition("second run:")
    assert "chosen images was" in first
    assert "other weights" in rest
    assert f"lora/{WEIGHT_FILE} differs by up to" in rest
    assert "chosen images was" in rest

    def stop(different):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reproduce(tmp_path / "run", tmp_path / "stopped", tell=stop)
    assert not list((tmp_path / "stopped").glob("*.jsonl"))
    shutil.rmtree(tmp_path / "in" / "pairs")
    assert main(["reproduce", str(tmp_path / "run"), "--check"]) == 2
    assert "pairs" in capsys.readouterr().err


def test_other_versions_are_named(finished, monkeypatch):
    told = json.loads((finished / MADE_WITH).read_text())
    told["versions"]["torch"] = "0.1"
    monkeypatch.setattr(module, "read_made_with", lambda folder: module.MadeWith(**told | {"resumed_with": ()}))
    assert set(compare(finished)) == {"torch"}


def test_a_folder_without_a_finished_run_is_refused(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "lora")
    with pytest.raises(InputError, match="finished"):
        reproduce(tmp_path / "run")
    with pytest.raises(InputError, match=MADE_WITH):
        compare(tmp_path)
