"""The README tells the truth: its snippets run, and its tree and commands name what is there."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from rpo.trainers.online_config import RolloutConfig

from rpo import write_pairs
from rpo.cli.main import COMMANDS, DEFAULTS, TRAINERS
from rpo.config import load_config
from rpo.curation.curate_config import CurateConfig
from rpo.data.preference import PreferencePair, encode_png
from rpo.runs.align_config import AlignConfig
from rpo.shapes.world import draw_scene, render, sample_prompts

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def demonstration_pairs(folder):
    prompts = sample_prompts("train", 8, seed=0)
    images = [
        encode_png(render(draw_scene(prompt, np.random.default_rng(index)))) for index, prompt in enumerate(prompts)
    ]
    write_pairs(
        folder,
        [PreferencePair(prompts[index].text, images[index], images[index - 1], name=f"{index}") for index in range(8)],
    )


def test_the_snippets_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    demonstration_pairs(tmp_path / "pairs")
    blocks = re.findall(r"<!-- executed by tests/test_readme.py -->\n```python\n(.*?)```", README, re.DOTALL)
    assert [len(re.findall(r"updates=20+\b", block)) for block in blocks] == [1, 1, 0]
    names: dict = {"small": {"rollout": RolloutConfig(prompts=2, num_steps=2), "preview_every": 0}}
    for block in blocks:
        quick = re.sub(r"updates=20+\b", "updates=2, progress=False", block)
        exec(quick.replace("ScoreAsActionConfig(", "ScoreAsActionConfig(**small, ", 1), names)  # noqa: S102
    assert names["image"].size == (64, 64)
    assert (tmp_path / "runs/mine/lora/pytorch_lora_weights.safetensors").is_file()
    assert "nothing was sent" in capsys.readouterr().out
    assert "default_0" in names["stock"].unet.peft_config


def test_every_command_in_the_readme_is_one():
    lines = [
        line.split("#")[0]
        for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL)
        for line in block.splitlines()
    ]
    commands = [shlex.split(line) for line in lines if line.strip()]
    assert len(commands) >= 5
    for words in commands:
        if words[0] == "rpo":
            assert any(" ".join(words[1:]).startswith(name) for name in (*COMMANDS, *DEFAULTS)), words
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file() or words[1] == "-m", words
        else:
            pytest.fail(f"unknown command {words}")


def test_the_tree_names_every_folder_and_what_lies_beside_them():
    tree = README.split("## The tree")[1].split("```")[1]
    named = {name for line in tree.splitlines() for name in line.strip().split("   ")[0].split()}
    package = {f"{path.parent.name}/" for path in (ROOT / "rpo").rglob("*/__init__.py")} - {"rpo/"}
    leaves = {path.name for path in (ROOT / "rpo").glob("*.py")} - {"__init__.py"}
    others = {"rpo/", "pipelines/", "configs/", "examples/", "benchmarks/", "scripts/", "docs/", "tests/"}
    assert named == package | leaves | others


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_loads_and_says_command_hardware_and_expectation(path):
    if path.stem.startswith("curate"):
        load_config(CurateConfig, path)
    elif path.stem.startswith("align"):
        load_config(AlignConfig, path)
    else:
        trainer = next(name for name in TRAINERS if path.stem.startswith(name.replace("-", "_")))
        load_config(import_module(TRAINERS[trainer]).RunConfig, path)
    header = re.split(r"^\w+:", path.read_text(), maxsplit=1, flags=re.MULTILINE)[0]
    assert all(word in header for word in ("# command", "# hardware", "# expected"))
