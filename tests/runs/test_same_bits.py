"""The same command with the same seed ends in the same bits: LoRA, records, images and metrics, times aside."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rpo.adapters.lora_file import WEIGHT_FILE
from rpo.data.writers import write_pairs
from tests.run_state import result_of
from tests.tiny import save_tiny_sd
from tests.trainers.pair_runs import toy_pairs

ROOT = Path(__file__).parents[2]

ONLINE = [
    "prompts={root}/prompts.txt",
    "rewards={{jpeg-compressibility: 1.0}}",
    "report=false",
    "rollout={{prompts: 2, images_per_prompt: 2, num_steps: 3, guidance_scale: 2.0}}",
    "adapter={{rank: 2}}",
    "preview_every=0",
    "preflight=false",
    "learning={{updates: 2, learning_rate: 0.01, ema_decay: 0.5, progress: false}}",
]
COMMANDS = {
    "train dpo": [
        "data.source={root}/pairs",
        "adapter.rank=2",
        "pairs_per_update=4",
        "max_chosen_error_ratio=.inf",
        "max_rejected_error_ratio=.inf",
        "learning={{updates: 2, learning_rate: 0.01, micro_batch: 2, ema_decay: 0.5, progress: false}}",
    ],
    "train grpo": ONLINE,
    "train score-as-action": [*ONLINE, "value={{pretrain_rollouts: 1, updates: 2}}"],
    "train endpoint": ONLINE,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_sd(folder / "model")
    write_pairs(folder / "pairs", toy_pairs(4))
    (folder / "prompts.txt").write_text("a red circle\ntwo dogs\na house\n")
    (folder / "none.yaml").write_text("{}\n")
    return folder


def twice(words, folder):
    """The results of a command that two processes run, whose sets and dicts have other orders."""
    found = []
    for number in "12":
        environment = {**os.environ, "PYTHONHASHSEED": number, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "rpo.cli", *words, f"output={folder / number}"]
        subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True)
        found.append(result_of(folder / number))
    return found


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_training_twice(root, tmp_path, command):
    words = [word.format(root=root) for word in COMMANDS[command]]
    given = [*command.split(), str(root / "none.yaml"), f"model.source={root}/model", "model.device=cpu", *words]
    first, second = twice(given, tmp_path)
    assert {f"lora/{WEIGHT_FILE}", "metrics.jsonl"} <= first.keys()
    assert len(first["metrics.jsonl"]) == 2
    assert_same(first, second)


@pytest.mark.slow
def test_curating_twice(tmp_path):
    words = ["curate", "source.limit=3", "source.images_per_prompt=2", "source.num_steps=4", "progress=false"]
    first, second = twice(words, tmp_path)
    assert [name.partition(".")[0] for name in first] == ["shards/0000000"]
    assert_same(first, second)


ALIGN = """
rounds: 2
curate:
  source: {limit: 4, images_per_prompt: 3, num_steps: 4}
  decide: {policy: always_edit, max_distance: 1.0}
  progress: false
dpo:
  pairs_per_update: 2
  adapter: {rank: 2}
  learning: {updates: 2, learning_rate: 0.01, micro_batch: 2, progress: false}
held_out: {count: 4, num_steps: 3}
"""


@pytest.mark.slow
def test_aligning_twice(tmp_path):
    (tmp_path / "align.yaml").write_text(ALIGN)
    first, second = twice(["align", str(tmp_path / "align.yaml")], tmp_path)
    assert {f"lora/{WEIGHT_FILE}", "rounds.jsonl"} <= first.keys()
    assert any(name.startswith("round-2/curate/shards/") for name in first)
    assert_same(first, second)
