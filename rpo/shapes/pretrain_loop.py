"""A training loop that can be killed: randomness from (seed, phase, step) alone, and a checkpoint written in one move.

Because no generator carries state from one step to the next, a run that continues from step k draws what an undisturbed
run draws; on a CPU the weights are then equal bit for bit.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rpo.devices import device_named
from rpo.errors import InputError
from rpo.text import read_text, write_text


class Stateful(Protocol):
    """Anything that training changes: a module, an optimizer."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to continue."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Continue from what `state_dict` gave."""
        ...


@dataclass(frozen=True)
class TrainingLog:
    """Writes every record as a line of JSON, and as a line for people."""

    file: Path
    """Gets the lines of JSON, after those that it has."""
    echo: Callable[[str], None]
    """Gets the lines for people."""

    def record(self, line: str, **values: Any) -> None:
        """Note `values`, and say `line`."""
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"time": round(time.time(), 2), **values}) + "\n")
        self.echo(line)


@dataclass(frozen=True)
class Phase:
    """One stretch of training: its name, its length, and how often it speaks and saves itself."""

    name: str
    steps: int
    seed: int
    checkpoint: Path
    log_every: int = 50
    save_every: int = 500


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU when there is one."""
    device = device_named(name)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return device


def discard(folder: Path, *files: str) -> None:
    """Forget the run in `folder`: what every run leaves there, and `files`."""
    for name in (*files, "settings.json", "log.jsonl"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "snapshots", ignore_errors=True)


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make `folder` that of a run with these settings, and refuse one that belongs to another run."""
    file = folder / "settings.json"
    if file.exists():
        earlier = json.loads(read_text(file))
        changed = [f"{key}: {earlier.get(key)} -> {new}" for key, new in settings.items() if earlier.get(key) != new]
        if changed:
            raise InputError(
                f"{folder} holds a run with other settings ({', '.join(changed)}), expected the same ones to "
                f"continue it; repeat them, or add --fresh to discard that run, or choose another --state"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(settings, indent=2) + "\n")


def seed_of(*numbers: int) -> int:
    """A generator seed from several numbers, without the overlaps that their sum would have."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def write_atomically(content: dict[str, Any], file: Path) -> None:
    """Save `content` with torch so that `file` is either the old one or the complete new one, also after a crash."""
    draft = file.with_name(file.name + ".draft")
    draft.parent.mkdir(parents=True, exist_ok=True)
    with draft.open("wb") as stream:
        torch.save(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(draft, file)


def restore(state: Mapping[str, Stateful], file: Path, device: torch.device) -> int:
    """Put `state` back to what `file` holds, and give the number of steps done; 0 without a file."""
    if not file.exists():
        return 0
    saved = torch.load(file, map_location=device, weights_only=True)
    for name, part in state.items():
        part.load_state_dict(saved["state"][name])
    return saved["step"]


def train(
    phase: Phase,
    take_step: Callable[[int, torch.Generator], Tensor],
    state: Mapping[str, Stateful],
    *,
    device: torch.device,
    log: TrainingLog,
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Run `take_step` until `phase.steps` steps are done, starting after those that the checkpoint holds.

    Args:
        take_step: One update, given its index and a generator on `device`; returns the loss, on the device.
        device: Where the generator lives and where a checkpoint is loaded to.
        after_step: Called with the number of steps done, after each, once the checkpoint is written.
    """
    first = restore(state, phase.checkpoint, device)
    if first:
        log.record(f"{phase.name}: continues after step {first}", phase=phase.name, resumed_at=first)
    generator = torch.Generator(device)
    meter = _Meter(phase, first, device)
    for step in range(first, phase.steps):
        generator.manual_seed(seed_of(phase.seed, *phase.name.encode(), step))
        meter.add(take_step(step, generator))
        done = step + 1
        if done % phase.log_every == 0 or done == phase.steps:
            meter.report(done, log)
        if done % phase.save_every == 0 or done == phase.steps:
            parts = {name: part.state_dict() for name, part in state.items()}
            write_atomically({"step": done, "state": parts}, phase.checkpoint)
        after_step(done)


class _Meter:
    """Sums the loss on the device, so that only a report waits for it."""

    def __init__(self, phase: Phase, first: int, device: torch.device) -> None:
        self._phase, self._first, self._last = phase, first, first
        self._sum = torch.zeros((), device=device)
        self._start = time.perf_counter()

    def add(self, loss: Tensor) -> None:
        self._sum += loss.detach()

    def report(self, done: int, log: TrainingLog) -> None:
        loss = self._sum.item() / (done - self._last)
        if not math.isfinite(loss):
            raise InputError(
                f"{self._phase.name}: the mean loss of steps {self._last + 1} to {done} is {loss}, expected a finite "
                f"number; lower --lr or change --seed and start again with --fresh"
            )
        rate = (done - self._first) / (time.perf_counter() - self._start)
        eta_seconds = (self._phase.steps - done) / rate
        name, steps = self._phase.name, self._phase.steps
        log.record(
            f"{name} {done}/{steps}  loss {loss:.4f}  {rate:.2f} it/s  {eta_seconds:.0f} s left",
            phase=name,
            step=done,
            loss=loss,
            steps_per_second=rate,
            eta_seconds=eta_seconds,
        )
        self._sum.zero_()
        self._last = done


def linear_warmup(step: int, *, warmup_steps: int, peak: float) -> float:
    """The learning rate of `step`: up to `peak` over `warmup_steps`, then constant."""
    return peak * min(1.0, (step + 1) / warmup_steps)


def one_cycle(step: int, *, steps: int, peak: float) -> float:
    """The learning rate of `step` under one cycle: from peak/25 to `peak` in the first 30 %, then down to nearly 0."""
    rise = 0.3 * steps
    if step < rise:
        low, high, progress = peak / 25, peak, step / rise
    else:
        low, high, progress = peak / 1e4, peak, 1 - (step - rise) / (steps - rise)
    return low + (high - low) * (1 - math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Use `value` in every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value


def round_to_half(modules: Iterable[torch.nn.Module]) -> None:
    """Round the weights to what the half-precision file will hold, so that the network in memory is the one on disk."""
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.copy_(parameter.to(torch.float16))
