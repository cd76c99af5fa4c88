"""A tiny regression with everything that makes resuming hard, and trainings of it that get killed.

Its loss uses all three global random generators (dropout, numpy, python) and a running mean of its own.
"""

import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from rpo.training import checkpoint
from rpo.training.loop import LoopConfig, TrainResult, fit
from rpo.types import StepOutput
from tests.forked import killed_in


@dataclass(frozen=True)
class Batch:
    x: Tensor
    y: Tensor
    names: list[str]


def toy_model() -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 1))
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) / 4)
    return model


def toy_batches(
    micro_batch: int = 4, accumulate: int = 1, process: int = 0, processes: int = 1
) -> Callable[[int], Iterator[Batch]]:
    """Update n always sees the same rows, however they are dealt to micro-batches and processes."""
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(2))
    y = x[:, :1] * 2 - x[:, 1:2]

    def draw(first_update: int) -> Iterator[Batch]:
        update = first_update
        while True:
            order = torch.randperm(64, generator=torch.Generator().manual_seed(100 + update))
            for part in range(accumulate):
                start = (part * processes + process) * micro_batch
                rows = order[start : start + micro_batch]
                yield Batch(x[rows], y[rows], [f"row-{row}" for row in rows.tolist()])
            update += 1

    return draw


def names(batch: Batch) -> list[str]:
    return batch.names


def plain_loss(model: nn.Module) -> Callable[[Batch], StepOutput]:
    """Without any randomness."""
    model.eval()

    def loss_fn(batch: Batch) -> StepOutput:
        errors = ((model(batch.x) - batch.y) ** 2).mean(dim=1)
        return StepOutput(errors.mean(), errors.detach(), {"dpo/margin": errors.detach().amax()})

    return loss_fn


LOOP = LoopConfig(updates=5, learning_rate=1e-2, checkpoint_every=2, progress=False)


def values(model):
    return [param.detach().clone() for param in model.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def run(folder, *, loop=LOOP, micro_batch=4, model=None, loss_fn=None, batches=None, **more):
    model = model or toy_model()
    loss_fn = loss_fn or plain_loss(model)
    batches = batches or toy_batches(micro_batch, loop.accumulate)
    result = fit(batches, loss_fn, list(model.parameters()), loop, folder=folder, names=names, **more)
    return model, result


class RunningMean:
    """A caller's own state, updated in the middle of an update and in place."""

    def __init__(self) -> None:
        self.value = torch.zeros(1)
        self.calls = 0

    def add(self, value: Tensor) -> None:
        self.value.mul_(0.9).add_(0.1 * value)
        self.calls += 1

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "calls": self.calls}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.value.copy_(state_dict["value"])
        self.calls = state_dict["calls"]


def noisy_loss(model: nn.Module, mean: RunningMean) -> Callable[[Batch], StepOutput]:
    model.train()

    def loss_fn(batch: Batch) -> StepOutput:
        jitter = 0.1 * np.random.standard_normal() + 0.1 * random.random()
        errors = ((model(batch.x) - batch.y + jitter) ** 2).mean(dim=1)
        mean.add(errors.detach().mean())
        return StepOutput(errors.mean() - mean.value.sum(), errors.detach(), {"dpo/margin": mean.value.sum()})

    return loss_fn


CONFIG = LoopConfig(
    updates=10,
    learning_rate=1e-2,
    lr_schedule="cosine",
    warmup_updates=3,
    accumulate=2,
    weight_decay=0.01,
    ema_decay=0.9,
    checkpoint_every=2,
    log_every=3,
    progress=False,
)


def train_noisy(
    folder: Path,
    *,
    kill_in_call: int | None = None,
    kill_in_checkpoint: str | None = None,
    resume: bool = False,
    loop: LoopConfig = CONFIG,
) -> tuple[nn.Module, RunningMean, TrainResult]:
    """Train the noisy toy, killing this very process (SIGKILL) where asked to."""
    model, mean = toy_model(), RunningMean()
    loss_fn = noisy_loss(model, mean)
    calls = 0

    def maybe_killed(batch: Batch) -> StepOutput:
        nonlocal calls
        calls += 1
        if calls == kill_in_call:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss_fn(batch)

    def sealed(path: Path, *others: Any) -> None:
        if path.name.startswith(kill_in_checkpoint or "never"):
            os.kill(os.getpid(), signal.SIGKILL)
        seal(path, *others)

    seal = checkpoint._seal
    with patch.object(checkpoint, "_seal", sealed):
        result = fit(
            toy_batches(accumulate=2),
            maybe_killed,
            list(model.parameters()),
            loop,
            folder=folder,
            names=names,
            resume=resume,
            state={"mean": mean},
            on_update=lambda update, metrics: random.random(),  # a hook must not disturb the run
        )
    return model, mean, result


def killed_runs(here: Path) -> None:
    """Runs that die, each in a folder named by what it was doing."""

    def train_to_death(folder: Path, **kill: Any) -> None:
        killed_in(partial(train_noisy, resume=True, **kill), folder)

    train_to_death(here / "update", kill_in_call=12)  # the second micro-batch of update 6
    shutil.copytree(here / "update", here / "saving")
    train_to_death(here / "saving", kill_in_checkpoint="checkpoint-000008")
    train_to_death(here / "early", kill_in_call=4)  # before the first checkpoint
