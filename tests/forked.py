"""Several processes of one group: forked from the test's own, so that nothing is imported again, or by torchrun."""

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def by_torchrun(*words: str, limit: int, options: tuple[str, ...] = ()) -> None:
    """Two processes of Python with these words, each of one thread, which have to end well within `limit` seconds."""
    ended = subprocess.run(
        [*TORCHRUN, *options, "--no-python", sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        check=False,
        timeout=limit,
    )
    assert ended.returncode == 0, ended.stderr


def killed_in(do: Callable[..., Any], *given: Any) -> None:
    """`do(*given)` in a child of this process, which has to kill itself."""
    child = os.fork()
    if child == 0:
        try:
            do(*given)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"{given} ended with {status}"


def together(count: int, folder: Path, do: Callable[..., Any], *given: Any, machines: int = 1, limit: int = 120) -> Any:
    """What `do(*given)` returns on each of `count` processes; raises what the first of them that fails raised."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = count // machines
    children = {}
    for rank in range(count):
        told = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank % own, "LOCAL_WORLD_SIZE": own}
        told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        child = os.fork()
        if child == 0:
            _be(told, folder / f"rank-{rank}.pkl", do, given)
        children[child] = rank
    try:
        _wait(children, folder, limit)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return [pickle.loads((folder / f"rank-{rank}.pkl").read_bytes()) for rank in range(count)]


def _be(told: dict[str, Any], answer: Path, do: Callable[..., Any], given: tuple[Any, ...]) -> None:
    status = 1
    try:
        os.environ.update({name: str(value) for name, value in told.items()})
        torch.set_num_threads(1)
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        answer.write_bytes(pickle.dumps(do(*given)))
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        status = 0
    except BaseException:
        answer.with_suffix(".txt").write_text(traceback.format_exc())
    finally:
        os._exit(status)


def _wait(children: dict[int, int], folder: Path, limit: int) -> None:
    """Until all have ended well; the first that has not ends all."""
    until = time.monotonic() + limit
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in children:
            rank = children.pop(child)
            told = folder / f"rank-{rank}.txt"
            assert status == 0, f"process {rank}: {told.read_text() if told.exists() else status}"
        assert time.monotonic() < until, f"processes {sorted(children.values())} still wait after {limit} s"
        time.sleep(0.02)
