"""Whether a run has the memory and the disk that it will need."""

import shutil
from pathlib import Path
from typing import Any

import torch

from rpo.devices import device_named
from rpo.errors import InputError
from rpo.files.text import read_lines_of
from rpo.models.base import ORIGINAL
from rpo.models.checkpoint import Checkpoint
from rpo.runs.plan import Plan, plan
from rpo.runs.train_config import DPORunConfig
from rpo.trainers.checks.memory import free_bytes, readable_bytes
from rpo.trainers.checks.preflight import Check
from rpo.trainers.dpo import DPO
from rpo.trainers.trainer import Trainer
from rpo.training.loop_config import LoopConfig

MEMORY_OF_THE_MACHINE = Path("/proc/meminfo")


def memory_check(config: Any) -> tuple[Check, Plan | None]:
    """What `rpo plan` counts against what is free now, before anything is loaded."""
    try:
        found = plan(config)
    except InputError as error:  # what is wrong with the checkpoint is told when it is loaded
        return Check("memory plan", True, f"not planned: {error}"), None
    free = available_bytes(device_named(config.model.device))
    at = max(found.peaks, key=found.peaks.__getitem__)
    told = "" if free is None else f"; {readable_bytes(free)} are free"
    return Check(
        "memory plan",
        free is None or found.peak < free,
        f"{readable_bytes(found.peak)} at most ({at}){told}",
        "`rpo plan … --memory SIZE` says what to change to fit; end what else uses the device",
    ), found


def available_bytes(device: torch.device) -> float | None:
    """What can still be had on a GPU, or on this machine; None where nobody can say."""
    if device.type != "cpu" or not MEMORY_OF_THE_MACHINE.is_file():
        return free_bytes(device)
    words = next(line for _, line in read_lines_of(MEMORY_OF_THE_MACHINE) if line.startswith("MemAvailable"))
    return float(words.split()[1]) * 1024


def disk_checks(config: Any, model: Checkpoint, trainer: Trainer | None, planned: Plan | None) -> list[Check]:
    """The room for checkpoints and the result, and for what is encoded once; together where they lie together."""
    trained = 0 if planned is None else planned.trained
    if trainer is not None:
        trained = sum(parameter.numel() for parameter in trainer.run.policy.parameters)
    copies = LoopConfig.keep_checkpoints + 1  # one is written before the oldest goes
    state = 12 + (4 if config.learning.ema_decay is not None else 0)
    needs = {_place(config.output): float(trained * (4 + copies * state))}
    if isinstance(config, DPORunConfig) and trainer is not None and isinstance(trainer.algorithm, DPO):
        cache = _place(config.cache_folder or config.output)
        needs[cache] = needs.get(cache, 0.0) + cache_bytes(config, model, trainer.algorithm)
    return [_disk(place, need) for place, need in needs.items()]


def cache_bytes(config: DPORunConfig, model: Checkpoint, algorithm: DPO) -> float:
    """Mean and deviation of the latents of every image that is visited, and the embedding of every prompt."""
    pairs = min(config.learning.updates * config.pairs_per_update, len(algorithm.pairs))
    images = len(algorithm.pairs[0].pictures) * pairs * (2 if config.flip else 1)
    told = algorithm.data.midway([0]).conditioning.prompt
    embedding = sum(one.nbytes for name, one in told.items() if name != ORIGINAL)
    texts = 2 * pairs if model.family.text_sees else min(pairs, len(algorithm.pairs.prompts))
    return images * 2 * 4.0 * algorithm.sizes.num_dims + texts * embedding


def _place(folder: str) -> Path:
    """The folder, or what there is of it."""
    place = Path(folder).absolute()
    return next(one for one in (place, *place.parents) if one.is_dir())


def _disk(place: Path, need: float) -> Check:
    free = shutil.disk_usage(place).free
    return Check(
        "disk",
        need < free,
        f"about {readable_bytes(need)} will be written below {place}; {readable_bytes(free)} are free",
        "make room, or give another output (or cache_folder)",
    )
