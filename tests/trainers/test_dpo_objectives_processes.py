"""Two processes with running moments and a measured context make the updates of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rpo.trainers.preference_config import PreferenceConfig
from rpo.trainers.region_config import RegionConfig

from rpo.data.readers import read_pairs
from rpo.data.writers import write_pairs
from rpo.trainers.dpo import DPOTrainer
from rpo.training.loop import LoopConfig
from rpo.training.processes import Processes
from tests.tiny import tiny_sd
from tests.trainers.test_dpo import config, toy_pairs, weights

ROOT = Path(__file__).parents[2]
OBJECTIVES = {
    "time": PreferenceConfig(normalization="time", context="reference", margin=0.2),
    "kto": PreferenceConfig(method="kto"),
}
SCRIPT = """
import sys
from pathlib import Path
from rpo.training.processes import Processes

Processes()  # joins the other process; what is imported from here on finds a group
from tests.trainers.test_dpo_objectives_processes import in_each_process

in_each_process(Path(sys.argv[1]))
"""


def trained(root, name, objective, *, micro_batch):
    # A large eps keeps Adam from blowing rounding of near-zero gradients up to whole steps.
    loop = LoopConfig(updates=3, learning_rate=3e-3, adam_eps=1e-3, progress=False)
    settings = config(
        root / name,
        cache_folder=str(root / "cache"),
        micro_batch=micro_batch,
        objective=objective,
        region=RegionConfig(is_on=True),
        loop=loop,
    )
    trainer = DPOTrainer(tiny_sd(), read_pairs(root / "pairs"), settings)
    trainer.train()
    return weights(trainer)


def in_each_process(root):
    torch.set_num_threads(1)
    seen = {
        name: trained(root, f"two-{name}", objective, micro_batch=2).tolist() for name, objective in OBJECTIVES.items()
    }
    (root / f"seen-{Processes().index}.json").write_text(json.dumps(seen))


@pytest.mark.slow
def test_two_processes_make_the_updates_of_one(tmp_path):
    write_pairs(tmp_path / "pairs", toy_pairs(5))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    ended = subprocess.run(
        [*torchrun, sys.executable, "-c", SCRIPT, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert ended.returncode == 0, ended.stderr
    seen = [json.loads((tmp_path / f"seen-{index}.json").read_text()) for index in range(2)]
    for name, objective in OBJECTIVES.items():
        ours, theirs = (torch.tensor(process[name]) for process in seen)
        assert torch.equal(ours, theirs)
        alone = trained(tmp_path, f"one-{name}", objective, micro_batch=4)
        torch.testing.assert_close(ours, alone, rtol=0, atol=2e-6)
