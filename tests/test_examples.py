"""Examples and benchmarks are stories of the public API, and run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def script(path, *arguments, cwd):
    done = subprocess.run(
        [sys.executable, str(ROOT / path), *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_train_dpo_without_a_configuration_trains_on_demonstration_pairs(tmp_path):
    said = script("examples/train_dpo.py", "learning.updates=2", "learning.progress=false", cwd=tmp_path)
    assert "loss 0.693 ->" in said
    assert (tmp_path / "runs/example/dpo/lora/pytorch_lora_weights.safetensors").is_file()


def test_train_score_as_action_without_a_configuration_trains_on_a_reward_of_its_own(tmp_path):
    said = script("examples/train_score_as_action.py", "--updates", "2", cwd=tmp_path)
    assert "2 updates; blueness of the same noise" in said
    assert (tmp_path / "runs/example/score_as_action/lora/pytorch_lora_weights.safetensors").is_file()


def test_rich_preferences_shows_a_pair_with_its_reason_and_trains_on_all(tmp_path):
    said = script("examples/rich_preferences.py", "--updates", "2", "source.limit=10", "progress=false", cwd=tmp_path)
    assert "the editor was told: " in said
    assert "labelled by reward:shapes-clip" in said
    assert (tmp_path / "runs/rich_preferences/pairs.html").is_file()
    assert (tmp_path / "runs/rich_preferences/dpo/lora/pytorch_lora_weights.safetensors").is_file()


def test_the_step_benchmark_counts_two_forwards_one_backward_and_no_encoding(tmp_path):
    said = script("benchmarks/dpo_step.py", "--updates", "2", "--micro-batch", "1", cwd=tmp_path)
    report = json.loads(said)
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
