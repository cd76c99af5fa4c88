"""Examples and benchmarks are stories of the public API, and run."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """What an example says, run in a folder of its own and in this process, so that nothing is imported again."""
    monkeypatch.chdir(tmp_path)

    def run(path, *arguments):
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        runpy.run_path(str(ROOT / path), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_train_dpo_without_a_configuration_trains_on_demonstration_pairs(tmp_path, script):
    said = script("examples/train_dpo.py", "learning.updates=2", "learning.progress=false")
    assert "loss 0.693 ->" in said
    assert (tmp_path / "runs/example/dpo/lora/pytorch_lora_weights.safetensors").is_file()


@pytest.mark.slow
def test_train_score_as_action_without_a_configuration_trains_on_a_reward_of_its_own(tmp_path, script):
    said = script("examples/train_score_as_action.py", "--updates", "2")
    assert "2 updates; blueness of the same noise" in said
    assert (tmp_path / "runs/example/score_as_action/lora/pytorch_lora_weights.safetensors").is_file()


def test_rich_preferences_shows_a_pair_with_its_reason_and_trains_on_all(tmp_path, script):
    said = script("examples/rich_preferences.py", "--updates", "2", "source.limit=10", "progress=false")
    assert "the editor was told: " in said
    assert "labelled by reward:shapes-clip" in said
    assert (tmp_path / "runs/rich_preferences/pairs.html").is_file()
    assert (tmp_path / "runs/rich_preferences/dpo/lora/pytorch_lora_weights.safetensors").is_file()


@pytest.mark.slow  # of the tiny model tests/trainers/test_dpo.py counts the same
def test_the_step_benchmark_counts_two_forwards_one_backward_and_no_encoding(tmp_path):
    words = [sys.executable, str(ROOT / "benchmarks/dpo_step.py"), "--updates", "2", "--micro-batch", "1"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["per_update"] == {
        "denoiser_forward_calls": 2,
        "denoiser_forward_rows": 4,
        "denoiser_backward_calls": 1,
        "vae_encode_calls": 0,
        "text_encode_calls": 0,
    }
    assert report["denoisers_in_memory"] == 1
    assert report["seconds_per_update"] > 0


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path):
    assert len(path.read_text().splitlines()) <= 80
