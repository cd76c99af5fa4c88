"""What is wrong with a run, all of it, before it is one: `rpo doctor ALGORITHM CONFIG`.

The real checkpoint, data and rewards are looked at in little, in the order in which a run meets them. Nothing is
trained, the run's folder is not touched, and what has to be written lies in a folder that is removed. A fault ends the
list only where nothing more can be said: wrong settings, or a checkpoint that does not load.
"""

import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sized
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, final

from rpo.adapters.loading import load_model
from rpo.data.preference import left_out
from rpo.evaluation.held_out import HeldOut
from rpo.files.text import lines
from rpo.models.checkpoint import Checkpoint, refuse_editor
from rpo.runs.room import disk_checks, memory_check
from rpo.runs.train import algorithm_of, require_deployment
from rpo.runs.train_config import RunConfig
from rpo.trainers.checks.adapter import drawn
from rpo.trainers.checks.examine import guarded, looks
from rpo.trainers.checks.parts import part_looks
from rpo.trainers.checks.preflight import Check
from rpo.trainers.dpo import DPO
from rpo.trainers.rollouts.algorithm import OnlineAlgorithm
from rpo.trainers.trainer import Algorithm, Trainer

Made = TypeVar("Made")

SAY = partial(print, flush=True)
"""At once: a run that is killed for want of memory has told so before."""

STEPS = 10
"""Of the picture that stands in where no data could be read."""


def doctor(load: Callable[[], RunConfig], *, say: Callable[[str], object] = SAY) -> list[Check]:
    """Look at everything, telling each line when it is known.

    Args:
        load: Gives the settings of the run; see `rpo.config.load.load_config`.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the network denoises no better")  # which is a line here
        found = _Visit(Path(folder), say).all_of(load)
    failed = sum(not check.passed for check in found)
    counted = f"{failed} of {len(found)} failed" if failed else f"all {len(found)} passed"
    say(f"{counted}, in {time.perf_counter() - began:.0f} s")
    return found


@final
class _Visit:
    """The lines so far, and how they come about."""

    def __init__(self, folder: Path, say: Callable[[str], object]):
        self._folder, self._say, self.found = folder, say, list[Check]()

    def all_of(self, load: Callable[[], RunConfig]) -> list[Check]:
        """Everything, in order."""
        config: Any = self._make("settings", load, lambda one: type(one).__name__.removesuffix("RunConfig"))
        if config is None:
            return self.found
        config = replace(config, learning=replace(config.learning, sharding="none"))  # here is one process
        planned = self._make("memory plan", lambda: memory_check(config), lambda one: one[0])
        model = self._make("checkpoint", lambda: load_model(config.model), _of_model)
        if model is None:
            return self.found
        algorithm = self._make("data", lambda: algorithm_of(replace(config, output=str(self._folder))), _of_data)
        trainer = None if algorithm is None else self._make("trainer", lambda: _trainer(model, algorithm), _of_trainer)
        if config.held_out is not None:
            self._make("held-out prompts", lambda: _held_out(config, model, trainer), lambda _: "none is trained on")
        if trainer is not None:
            every = looks(trainer, self._folder / "lora")
        else:  # the checkpoint can be looked at all the same
            canvas = model.canvas
            every = part_looks(model, lambda: drawn(model, "a", STEPS, canvas=canvas), num_steps=STEPS, canvas=canvas)
        for name, look in every.items():
            self._look(name, look)
        self._look("disk", lambda: disk_checks(config, model, trainer, None if planned is None else planned[1]))
        return self.found

    def _look(self, name: str, look: Callable[[], Iterable[Check]]) -> None:
        for check in guarded(name, look):
            self.found.append(check)
            self._say(str(check))
            if not check.passed and check.advice:
                self._say(f"        {check.advice}")

    def _make(self, name: str, make: Callable[[], Made], told: Callable[[Made], str | Check]) -> Made | None:
        """Something whose making is a line; None where it cannot be made."""
        made: list[Made] = []

        def look() -> Iterable[Check]:
            made.append(make())
            line = told(made[0])
            yield line if isinstance(line, Check) else Check(name, True, line)

        self._look(name, look)
        return made[0] if made else None


def _trainer(model: Checkpoint, algorithm: Algorithm[Any]) -> Trainer:
    trainer = Trainer(model, algorithm)
    if isinstance(algorithm, OnlineAlgorithm):
        algorithm.collector.rollouts.failed.evidence = None  # a message would name a folder that is gone
    return trainer


def _held_out(config: Any, model: Checkpoint, trainer: Trainer | None) -> HeldOut:
    require_deployment(config)
    refuse_editor(model, "held_out")
    held_out = HeldOut(config.held_out)
    if trainer is not None:
        held_out.refuse_trained(trainer.algorithm.previewed().prompts)
    return held_out


def _of_model(model: Checkpoint) -> str:
    return f"{model.family.name}, {model.weight_dtype}, computes in {model.compute_dtype} on {model.device}"


def _of_data(algorithm: Algorithm[Any]) -> str:
    if not isinstance(algorithm, DPO):
        prompts = algorithm.prompts if isinstance(algorithm, OnlineAlgorithm) else None
        return f"{len(prompts)} prompts" if isinstance(prompts, Sized) else "given"
    notes = left_out(algorithm.pairs)
    return f"{len(algorithm.pairs)} pairs of {len(algorithm.pairs.prompts)} prompts" + (f"; {notes}" if notes else "")


def _of_trainer(trainer: Trainer) -> str:
    return lines(trainer.plan())[0]
