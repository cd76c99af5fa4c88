"""Runs whose reward is another process, which is killed, comes back, is late or wrong: all end in the same bits."""

import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path

import pytest

from rpo.rewards import RewardError
from tests.rewards.remote.servers import answering, response
from tests.rewards.remote.servers import serving as in_a_thread
from tests.run_state import metrics_of
from tests.trainers.online_runs import ROLLOUT, digest, grpo, learning, lightness

ROOT = Path(__file__).parents[2]
NAME = "tests.trainers.test_reward_server:contrast"
LEARNING = learning(4, checkpoint_every=1)


def contrast(images, prompts):
    """A reward that fails for some images, whichever: about a third of them."""
    values = images.std(dim=(1, 2, 3))
    return values.masked_fill((1e4 * lightness(images, prompts)).long() % 3 == 0, float("nan"))


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def started(port):
    words = ["-m", "rpo.cli", "serve-rewards", NAME, "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def until_it_answers(port):
    end = time.monotonic() + 100
    while True:
        connection = HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health")
            assert connection.getresponse().status == 200
            return
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.1)
        finally:
            connection.close()


@contextmanager
def serving():
    """A port, and a list whose last process listens there."""
    port = free_port()
    processes = [started(port)]
    try:
        until_it_answers(port)
        yield port, processes
    finally:
        for one in processes:
            one.kill()
            one.wait()


def run_of(folder, port, patience=100):
    reward = f"http://127.0.0.1:{port}/{NAME}?patience={patience}"
    rollout = replace(ROLLOUT, prompts=2, images_per_prompt=4, num_steps=2, max_failed=0.9)
    return grpo(folder, reward={reward: 1.0}, rollout=rollout, learning=LEARNING, preflight=False)


def killed_after(update, processes):
    """What kills the server there and starts another one, which nobody waits for."""

    def on_update(done, metrics):
        if done == update:
            processes[-1].kill()
            processes[-1].wait()
            threading.Timer(0.5, lambda: processes.append(started(processes[-1].args[-3]))).start()

    return on_update


def test_a_server_that_is_killed_and_comes_back_changes_no_bit(tmp_path):
    with serving() as (port, processes):
        undisturbed, disturbed = run_of(tmp_path / "one", port), run_of(tmp_path / "two", port)
        undisturbed.train()
        disturbed.train(on_update=killed_after(2, processes))
        assert len(processes) == 2
    assert digest(disturbed) == digest(undisturbed)
    assert metrics_of(disturbed.folder) == metrics_of(undisturbed.folder)
    assert any(0 < line["reward/failed"] < 1 for line in metrics_of(disturbed.folder))


def ended(processes):
    def on_update(done, metrics):
        if done == 2:
            processes[-1].kill()
            processes[-1].wait()

    return on_update


@pytest.mark.slow
def test_a_run_that_waits_in_vain_ends_and_resumes_in_the_same_bits(tmp_path):
    with serving() as (port, processes):
        undisturbed = run_of(tmp_path / "one", port)
        undisturbed.train()
        left = run_of(tmp_path / "two", port, patience=0.5)
        with pytest.raises(RewardError, match=f"127.0.0.1:{port}.*{NAME}.*does not answer.*resume"):
            left.train(on_update=ended(processes))
        elsewhere = free_port()
        processes.append(started(elsewhere))
        until_it_answers(elsewhere)
        resumed = run_of(tmp_path / "two", elsewhere)
        resumed.train(resume=True)
    assert digest(resumed) == digest(undisturbed)
    assert metrics_of(resumed.folder) == metrics_of(undisturbed.folder)


WRONG = {
    "wrong count": response({"scores": [1.0], "failures": [None], "info": {}}),
    "NaN": response(b'{"scores": [1, NaN, 1, 1, 1, 1, 1, 1], "failures": [], "info": {}}'),
    "HTML": response(b"<html>", kind="text/html"),
    "10 MB": response(b"[" + b"1," * 5_000_000 + b"1]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_server_that_answers_wrongly_ends_the_run_and_teaches_it_nothing(name, tmp_path):
    with in_a_thread({NAME: contrast}) as server:
        port = server.address.rpartition(":")[2]
        run = run_of(tmp_path / "one", port)
        run.train()
        listed = {"rewards": [NAME], "rpo": {"form": 1, "max_bytes": 10**9, "files": None, "details": {}}}
        with answering(WRONG[name], listed=listed) as (place, _asked):
            other = run_of(tmp_path / "two", place.rpartition(":")[2])
            start = digest(other)
            with pytest.raises(RewardError, match="nothing was taken"):
                other.train()
            assert digest(other) == start and not metrics_of(other.folder)
        resumed = run_of(tmp_path / "two", port)
        resumed.train(resume=True)
    assert digest(resumed) == digest(run)
