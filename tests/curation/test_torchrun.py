"""Two processes of torchrun with a share of the shards each, killed and started again; slow."""

import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from rpo.config.load import to_yaml
from rpo.curation.store.address import Store
from rpo.curation.store.mark import STAGES, read_marks
from tests.curation.fakes import config_of, finished, image_folder, lines_of, named
from tests.curation.test_killed import require_same_exports, require_same_shards
from tests.forked import ROOT, TORCHRUN

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

COUNT, SHARD, KILLS = 240, 4, 10


def of_run(agent):
    """The two processes that curate, oldest first; none while they are being started."""
    found = psutil.Process(agent.pid).children()
    return found if len(found) == 2 else []


def num_done(output):
    return sum(len(mark.stages) == len(STAGES) for mark in read_marks(Store(output)))


def test_killed_processes_are_started_again_and_lose_nothing(tmp_path):
    source = image_folder(tmp_path / "source", COUNT)
    undisturbed = finished(config_of(tmp_path / "undisturbed" / "run", source, shard=SHARD)).store.address
    output = tmp_path / "killed" / "run"
    (tmp_path / "run.yaml").write_text(to_yaml(named(config_of(output, source, shard=SHARD))))
    options = ["--max-restarts", str(KILLS), "--monitor-interval", "0.1", "--no-python", sys.executable]
    words = [*TORCHRUN, *options, "-m", "rpo.cli", "curate", str(tmp_path / "run.yaml"), "--resume"]
    chance, killed, log = random.Random(0), set(), tmp_path / "log"
    with log.open("w") as told:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        agent = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=told, stderr=told)
        try:
            for kill in range(KILLS):
                done = num_done(output) if output.exists() else 0
                while not output.exists() or num_done(output) <= done + (kill > 0) * 1:
                    assert agent.poll() is None, log.read_text()
                    time.sleep(0.02)
                time.sleep(chance.uniform(0, 0.2))
                doomed = chance.choice(of_run(agent))
                assert doomed.pid not in killed
                killed.add(doomed.pid)
                doomed.send_signal(signal.SIGKILL)
                while any(one.pid == doomed.pid for one in of_run(agent)):
                    time.sleep(0.02)
            assert agent.wait(300) == 0, log.read_text()
        finally:
            agent.kill()
    assert len(killed) == KILLS
    assert lines_of(output) == lines_of(undisturbed)
    require_same_shards(output, undisturbed)
    require_same_exports(output, undisturbed)
