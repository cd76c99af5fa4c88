"""What ends one process ends all with one message; killed ones are started again, and end where nothing was killed."""

import os
import signal
import time

import pytest
import torch

from rpo.adapters.lora_file import WEIGHT_FILE
from rpo.training.log import read_metrics
from rpo.training.processes import Processes
from tests.forked import by_torchrun, together
from tests.trainers.online_runs import grpo
from tests.trainers.pair_runs import steady
from tests.trainers.test_sharding import corner, online, pairs

UPDATES = 6
KILLS = {(0, 1), (1, 0), (3, 1), (5, 0)}
"""(updates done, process): before the first checkpoint, after it, within an interval of two, before the last."""
SCRIPT = """
import sys
from pathlib import Path
from rpo.training.processes import Processes

Processes()  # joins the other process; what is imported from here on finds a group
from tests.trainers.test_lost_processes import KILLS, run

run(Path(sys.argv[1]), sys.argv[2], KILLS)
"""
SECONDS = 10


def blind(images, prompts):
    if Processes().index == 1:
        raise ValueError("no image is bright enough")
    return corner(images, prompts)


def ended(folder):
    """How and when it ends on this process; the connections close as when it is gone."""
    trainer, started = online(folder, "none", make=grpo, reward=blind, preflight=False), time.monotonic()
    try:
        trainer.train()
    except ValueError as error:
        return type(error).__name__, str(error), time.monotonic() - started
    finally:
        torch.distributed.destroy_process_group()


def test_a_reward_that_raises_on_one_process_ends_all_with_its_message(tmp_path):
    (waiting, told, seconds), (failed, own, _) = together(2, tmp_path / "answers", ended, tmp_path / "run")
    assert (failed, waiting) == ("RewardError", "LostProcessError")
    assert "no image is bright enough" in own
    assert told.startswith(f"process 1 of 2 failed, RewardError: {own[:20]}") and "no image is bright enough" in told
    assert seconds < SECONDS


def run(root, sharding, kills=frozenset()):
    """Trains and saves; is killed once at each of `kills`, between a batch and its update."""
    torch.set_num_threads(1)
    speed = {"updates": UPDATES, "checkpoint_every": 2}
    trainer = steady(pairs(root / "run", sharding, speed=speed))
    batches, index = trainer.algorithm.batches, Processes().index

    def mortal(first):
        for update, batch in enumerate(batches(first), first):
            mark = root / f"killed-{update}-{index}"
            if (update, index) in kills and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    trainer.algorithm.batches = mortal
    trainer.train(resume=True)
    return trainer.save()


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_killed_processes_are_started_again_and_end_in_the_same_file(tmp_path, sharding):
    by_torchrun(
        "-c",
        SCRIPT,
        str(tmp_path),
        sharding,
        limit=400,
        options=("--max-restarts", str(len(KILLS)), "--monitor-interval", "0.1"),
    )
    assert len(list(tmp_path.glob("killed-*"))) == len(KILLS)
    files = [tmp_path / "run" / "lora" / WEIGHT_FILE]
    files.append(together(2, tmp_path / "answers", run, tmp_path / "undisturbed", sharding)[0] / WEIGHT_FILE)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [line["update"] for line in read_metrics(tmp_path / "run")] == list(range(1, UPDATES + 1))
