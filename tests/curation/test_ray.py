"""A real cluster of Ray on this machine: two nodes, of which one is killed, and a driver that is killed; slow."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from rpo.config.load import to_yaml
from rpo.curation.curate_config import ChatConfig
from rpo.curation.store.address import Store
from rpo.curation.store.mark import STAGES, read_marks
from tests.curation.fakes import config_of, finished, image_folder, lines_of, named, sealed
from tests.curation.test_killed import require_same_exports, require_same_shards

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parent.parent.parent
COUNT, SHARD = 200, 4
KILLS = 10


def settings(output, source, **changes):
    return named(config_of(output, source, shard=SHARD, **changes))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("source"), COUNT)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, source):
    config = config_of(tmp_path_factory.mktemp("undisturbed") / "run", source, shard=SHARD)
    return finished(config).store.address


@pytest.fixture(scope="module")
def cluster():
    """A head without room for workers, and two nodes with one each."""
    from ray.cluster_utils import Cluster

    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    os.environ |= environment
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield found
    found.shutdown()


def driver(cluster, folder, config, *, resume=False):
    """`rpo curate` in a process of its own."""
    (folder / "run.yaml").write_text(to_yaml(config))
    words = [sys.executable, "-m", "rpo.cli", "curate", str(folder / "run.yaml"), *(["--resume"] if resume else [])]
    environment = {**os.environ, "RAY_ADDRESS": cluster.address, "PYTHONPATH": str(ROOT)}
    log = (folder / "log").open("a")
    return subprocess.Popen(words, env=environment, stdout=log, stderr=log, cwd=ROOT)


def wait_for(holds, process, seconds=400):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end and (process.poll() is None)
        time.sleep(0.02)


def num_done(output):
    return sum(len(mark.stages) == len(STAGES) for mark in read_marks(Store(output)))


def has_gone_on(output, since):
    return num_done(output) > since


def test_nodes_are_killed_in_the_middle(cluster, undisturbed, source, tmp_path):
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    chance, killed, output = random.Random(0), 0, tmp_path / "run"
    run = driver(cluster, tmp_path, settings(output, source, engine="ray", workers=2))
    while killed < KILLS:
        wait_for(partial(has_gone_on, output, num_done(output)), run)
        time.sleep(chance.uniform(0, 0.3))
        cluster.remove_node(nodes.pop(0), allow_graceful=False)
        nodes.append(cluster.add_node(num_cpus=1))
        killed += 1
    assert run.wait(300) == 0, (tmp_path / "log").read_text()
    for node in nodes:
        cluster.remove_node(node)
    assert lines_of(output) == lines_of(undisturbed)
    require_same_shards(output, undisturbed)
    require_same_exports(output, undisturbed)


def test_the_driver_is_killed(cluster, undisturbed, source, tmp_path):
    node = cluster.add_node(num_cpus=2)
    chance, output = random.Random(0), tmp_path / "run"
    config = settings(output, source, engine="ray", workers=2)
    killed = 0
    while killed < KILLS:
        done, run = num_done(output), driver(cluster, tmp_path, config, resume=True)
        while run.poll() is None and num_done(output) <= done:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.2))
        if run.poll() is None:
            os.kill(run.pid, signal.SIGKILL)
            run.wait()
            killed += 1
        else:  # it came to its end before: half of it is to be done again
            assert run.returncode == 0, (tmp_path / "log").read_text()
            for number in chance.sample(sealed(output), k=COUNT // SHARD // 2):
                Store(output).remove(f"shards/{number:07}.json")
    assert driver(cluster, tmp_path, config, resume=True).wait(300) == 0, (tmp_path / "log").read_text()
    cluster.remove_node(node)
    assert lines_of(output) == lines_of(undisturbed)
    require_same_exports(output, undisturbed)


def test_what_a_worker_refuses_is_told_by_the_driver(cluster, source, tmp_path):
    node = cluster.add_node(num_cpus=1)
    config = replace(settings(tmp_path / "run", source, engine="ray"), critic=ChatConfig(kind="no.such:thing"))
    assert driver(cluster, tmp_path, config).wait(120) == 2
    cluster.remove_node(node)
    log = (tmp_path / "log").read_text()
    assert "rpo: error: critic of kind 'no.such:thing' cannot be imported" in log
    assert not (tmp_path / "run").exists()
