"""The DPO script of diffusers itself, on a set that rpo writes; it is in no package, so that its file has to be named.

DIFFUSERS_DPO_SCRIPT=…/examples/research_projects/diffusion_dpo/train_diffusion_dpo.py pytest -m slow tests/elsewhere
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import rpo.shapes
from rpo.adapters.lora_file import inspect_lora
from rpo.data.writers import write_pickapic
from tests.test_docs import PAGES
from tests.trainers.pair_runs import toy_pairs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def script():
    """The file, if it is there, and what it imports."""
    found = os.environ.get("DIFFUSERS_DPO_SCRIPT")
    if not found:
        pytest.skip("the script is in no package: name its file in DIFFUSERS_DPO_SCRIPT")
    return Path(found)


def test_it_trains_on_what_rpo_writes(script, tmp_path):
    if missing := [name for name in ("torchvision", "wandb") if find_spec(name) is None]:
        pytest.skip(f"the script imports {' and '.join(missing)}, which is not installed")
    (tmp_path / "pairs").mkdir()
    write_pickapic(tmp_path / "pairs/train.parquet", toy_pairs())
    arguments = {
        "pretrained_model_name_or_path": rpo.shapes.path(),
        "dataset_name": tmp_path / "pairs",
        "dataset_split_name": "train",
        "resolution": 64,
        "max_train_steps": 2,
        "report_to": "wandb",
        "output_dir": tmp_path / "lora",
    }
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(script), *words], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert inspect_lora(tmp_path / "lora").ranks == (4,)


def test_every_argument_with_a_counterpart_is_in_the_table(script):
    told = set(re.findall(r"--(\w+)", PAGES["from_diffusers_dpo.md"]))
    given = set(re.findall(r'"--(\w+)"', script.read_text()))
    assert (
        given - told
        == {
            "allow_tf32",
            "cache_dir",
            "dataloader_num_workers",
            "hub_token",
            "local_rank",
            "logging_dir",
            "lr_num_cycles",
            "lr_power",
            "prior_generation_precision",
            "seed",
        }
        - told
    )
    assert {"2500", "5e-4"} <= set(re.findall(r"default=(\S+?),?\s", script.read_text()))
