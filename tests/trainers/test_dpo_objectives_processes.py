"""Two processes with running moments and a measured context make the updates of one."""

import json

import pytest
import torch

from rpo.data.readers import read_pairs
from rpo.data.writers import write_pairs
from rpo.objectives.preference.dpo import Dpo
from rpo.objectives.preference.kto import Kto
from rpo.objectives.preference.region import RegionConfig
from rpo.training.processes import Processes
from tests.forked import by_torchrun
from tests.trainers.pair_runs import steady, toy_pairs, trainer_of, weights

OBJECTIVES = {
    "time": Dpo(normalization="time", context="reference", margin=0.2),
    "kto": Kto(),
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
    settings = {"cache_folder": str(root / "cache"), "objective": objective, "region": RegionConfig()}
    learning = {"micro_batch": micro_batch, "learning_rate": 3e-3}
    trainer = steady(trainer_of(root / name, pairs=read_pairs(root / "pairs"), learning=learning, **settings))
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
    by_torchrun("-c", SCRIPT, str(tmp_path), limit=280)
    seen = [json.loads((tmp_path / f"seen-{index}.json").read_text()) for index in range(2)]
    for name, objective in OBJECTIVES.items():
        ours, theirs = (torch.tensor(process[name]) for process in seen)
        assert torch.equal(ours, theirs)
        alone = trained(tmp_path, f"one-{name}", objective, micro_batch=4)
        torch.testing.assert_close(ours, alone, rtol=0, atol=2e-6)
