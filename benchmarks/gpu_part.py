"""What a part of `gpu.py` is: something to find out in so many seconds, in a process of its own.

What it finds is sent on at once, so that a part that fails, crashes or takes too long leaves what it had found.
"""

import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

Note = Callable[[str, Any], None]
"""Keeps a finding, JSON, under a name."""

LINES_OF_AN_ERROR = 6


class Skipped(Exception):
    """Raised by a part that cannot run here, with the reason."""


@dataclass(frozen=True)
class Setting:
    """Where parts run."""

    device: str

    @property
    def where(self) -> torch.device:
        """The device."""
        return torch.device(self.device)

    @property
    def on_gpu(self) -> bool:
        """Or else it is a rehearsal: tiny networks, to see that all is in its place."""
        return self.where.type == "cuda"

    def require_gpu(self, what: str) -> None:
        """Skip what a processor does not have."""
        if not self.on_gpu:
            raise Skipped(f"{what} needs a GPU")


@dataclass(frozen=True)
class Part:
    """One line of the plan."""

    what: str
    """For a person."""
    seconds: float
    """At most."""
    run: Callable[[Setting, Note], None]


def run_part(part: Part, setting: Setting, seconds: float) -> dict[str, Any]:
    """What a part found in so many seconds, and how it ended: done, skipped, failed or out of time."""
    # Forked, a part has all libraries at hand; this process never touches the device.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    ours, theirs = context.Pipe(duplex=False)
    started = time.perf_counter()
    worker = context.Process(target=_work, args=(part, setting, theirs), daemon=False)
    worker.start()
    theirs.close()
    report: dict[str, Any] = {"status": "failed", "reason": "it ended without a word", "found": {}}
    try:
        while ours.poll(max(0.0, started + seconds - time.perf_counter())):
            kind, *told = ours.recv()
            if kind == "found":
                report["found"][told[0]] = told[1]
            else:
                report |= {"status": kind, "reason": told[0]}
                break
        else:
            report |= {"status": "out of time", "reason": f"it was stopped after {seconds:.0f} s"}
    except EOFError:
        worker.join()
        report["reason"] = f"its process ended with {worker.exitcode}"
    finally:
        worker.join(timeout=1)
        if worker.is_alive():
            worker.kill()
        worker.join()
        ours.close()
    return report | {"seconds": time.perf_counter() - started, "budget": seconds}


def _work(part: Part, setting: Setting, told: Connection) -> None:
    with redirect_stdout(sys.stderr):  # what the program prints is the table alone
        try:
            part.run(setting, lambda name, found: told.send(("found", name, found)))
        except Skipped as reason:
            told.send(("skipped", str(reason)))
        except Exception as error:
            lines = traceback.format_exc().strip().split("\n")[-LINES_OF_AN_ERROR:]
            told.send(("failed", f"{type(error).__name__}: {error}\n" + "\n".join(lines)))
        else:
            told.send(("done", ""))
