"""Runs whose reward is another process, which is killed, comes back, is late or wrong: all end in the same bits."""

import multiprocessing
import os
import socket
import threading
import time
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from http.client import HTTPConnection

import pytest

from rpo.cli.main import main
from rpo.rewards import RewardError
from tests.marks import slow_but
from tests.rewards.remote.servers import answering, response
from tests.rewards.remote.servers import serving as in_a_thread
from tests.run_state import metrics_of
from tests.trainers.online_runs import ROLLOUT, digest, grpo, learning, lightness

FORK = multiprocessing.get_context("fork")
"""So that nothing is imported a second time."""

NAME = "tests.trainers.test_reward_server:contrast"
LEARNING = learning(4, checkpoint_every=1)


def contrast(images, prompts):
    """A reward that fails for some images, whichever: about a third of them."""
    values = images.std(dim=(1, 2, 3))
    return values.masked_fill((1e4 * lightness(images, prompts)).long() % 3 == 0, float("nan"))


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def serve(port, may_start):
    may_start.wait()
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        main(["serve-rewards", NAME, "--port", str(port), "--device", "cpu"])


def started(port, may_start=None):
    """A process that serves, at once or as soon as it may."""
    if may_start is None:
        (may_start := FORK.Event()).set()
    process = FORK.Process(target=serve, args=(port, may_start), daemon=True)
    process.start()
    return process


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
    """A port, and a list whose last process that may start listens there."""
    port = free_port()
    processes = [started(port)]
    try:
        until_it_answers(port)
        yield port, processes
    finally:
        for one in processes:
            one.kill()
            one.join()


def run_of(folder, port, patience=100):
    reward = f"http://127.0.0.1:{port}/{NAME}?patience={patience}"
    rollout = replace(ROLLOUT, prompts=2, images_per_prompt=4, num_steps=2, max_failed=0.9)
    return grpo(folder, reward={reward: 1.0}, rollout=rollout, learning=LEARNING, preflight=False)


def killed_after(update, server, another):
    """What kills the server there and lets another one start, which nobody waits for."""

    def on_update(done, metrics):
        if done == update:
            server.kill()
            server.join()
            threading.Timer(0.5, another.set).start()

    return on_update


def test_a_server_that_is_killed_and_comes_back_changes_no_bit(tmp_path):
    with serving() as (port, processes):
        undisturbed, disturbed = run_of(tmp_path / "one", port), run_of(tmp_path / "two", port)
        undisturbed.train()
        another = FORK.Event()
        processes.append(started(port, another))
        disturbed.train(on_update=killed_after(2, processes[0], another))
        assert another.is_set() and processes[1].is_alive()
    assert digest(disturbed) == digest(undisturbed)
    assert metrics_of(disturbed.folder) == metrics_of(undisturbed.folder)
    assert any(0 < line["reward/failed"] < 1 for line in metrics_of(disturbed.folder))


def ended(processes):
    def on_update(done, metrics):
        if done == 2:
            processes[-1].kill()
            processes[-1].join()

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


@pytest.mark.parametrize("name", slow_but(("NaN",), WRONG))
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
