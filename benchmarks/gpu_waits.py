"""How often the host waits for the device: in a rollout's loop, in a loss and its gradient, and in whole updates.

On a GPU torch itself says so (`torch.cuda.set_sync_debug_mode`); every wait is told with the line that it comes from.
In the loops there must be none: a wait drains the queue, and the device idles until the next call has come. On a
processor nothing waits; there numbers are counted that the host reads, which on a GPU would be waits.
"""

import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gpu_parity import coloured_pairs
from gpu_part import Note, Setting
from torch.utils._python_dispatch import TorchDispatchMode

from rpo.adapters.loading import load_model
from rpo.models.config import ModelConfig
from rpo.objectives.endpoint.nft import Nft
from rpo.process.transition import Ddim
from rpo.sampling.sample import image_generator, sample
from rpo.trainers.dpo import DPO
from rpo.trainers.dpo_config import DPOConfig
from rpo.trainers.endpoint import Endpoint
from rpo.trainers.endpoint_config import EndpointConfig
from rpo.trainers.grpo import GRPO
from rpo.trainers.grpo_config import GRPOConfig
from rpo.trainers.rollouts.settings import MonitorConfig, OnlineLearningConfig, RolloutConfig
from rpo.trainers.settings import LearningConfig
from rpo.trainers.trainer import Trainer

UPDATES, STEPS = 3, 4
PROMPTS = ["a red circle", "a blue square"]
SAID = "called a synchronizing CUDA operation"
HERE = Path(__file__).parent.parent


class _Reads(TorchDispatchMode):
    """Counts numbers that the host reads, by line."""

    def __init__(self, found: Counter[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            stack = traceback.extract_stack()
            if not any("/torch/optim/" in frame.filename for frame in stack):  # where a fused one reads nothing
                self.found[_place(stack)] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def waits(device: torch.device) -> Iterator[Counter[str]]:
    """Counts by line of code what happens inside."""
    found: Counter[str] = Counter()
    if device.type != "cuda":
        with _Reads(found):
            yield found
        return
    shown = warnings.showwarning

    def note(message: Any, *rest: Any, **named: Any) -> None:
        if SAID in str(message):
            found[_place(traceback.extract_stack())] += 1
        else:
            shown(message, *rest, **named)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _place(stack: traceback.StackSummary) -> str:
    """The innermost line of the package."""
    own = [frame for frame in stack if f"{HERE}/rpo/" in frame.filename]
    if not own:
        return "outside of rpo"
    return f"{Path(own[-1].filename).relative_to(HERE)}:{own[-1].lineno}"


def count_waits(setting: Setting, note: Note) -> None:
    """In the loops, and in runs of every kind."""
    model = load_model(ModelConfig(device=setting.device))
    note("rollout loop", _in_sampling(model, setting.where))
    for name, make in ALGORITHMS.items():
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(model, make(folder))
            trainer.algorithm.prepare()
            note(f"{name}: loss and gradient", _in_loss(trainer, setting.where))
        model.pipe.unload_lora_weights()
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(model, make(folder))
            note(f"{name}: all of an update", _in_updates(trainer, setting.where))
        model.pipe.unload_lora_weights()


def _in_sampling(model: Any, device: torch.device) -> dict[str, Any]:
    cond, grid = model.encode_prompts(PROMPTS), model.grid(STEPS)
    generators = [image_generator(0, image, 0) for image in range(len(PROMPTS))]
    with waits(device) as found:
        sample(model, cond, grid, Ddim(1.0), guidance_scale=3.0, generators=generators)
    return {"waits": found.total(), "at": dict(found)}


def _in_loss(trainer: Trainer, device: torch.device) -> dict[str, Any]:
    batches = trainer.algorithm.batches(0)
    trainer.algorithm.loss(next(batches)).loss.backward()  # the first one moves tables to the device
    batch = next(batches)
    with waits(device) as found:
        trainer.algorithm.loss(batch).loss.backward()
    return {"waits": found.total(), "at": dict(found)}


def _in_updates(trainer: Trainer, device: torch.device) -> dict[str, Any]:
    """Of the updates after the first, the mean; drawing, logging and the optimizer's step included."""
    laps = list[Counter[str]]()
    with waits(device) as found:
        trainer.train(on_update=lambda update, metrics: laps.append(Counter(found)))
    between = laps[-1] - laps[0]
    mean = {place: count / (len(laps) - 1) for place, count in between.most_common()}
    return {"waits": sum(mean.values()), "at": mean}


def _online(folder: str) -> dict[str, Any]:
    return {
        "rollout": RolloutConfig(prompts=2, images_per_prompt=4, num_steps=STEPS, guidance_scale=2.0),
        "monitor": MonitorConfig(every=None, canaries=False),
        "learning": OnlineLearningConfig(updates=UPDATES, micro_batch=8, progress=False, checkpoint_every=UPDATES),
        "preview_every": 0,
        "preflight": False,
        "output": folder,
    }


def _dpo(folder: str) -> DPO:
    limits = {"max_chosen_error_ratio": float("inf"), "max_rejected_error_ratio": float("inf")}
    learning = LearningConfig(updates=UPDATES, micro_batch=2, progress=False, checkpoint_every=UPDATES)
    options = {"preview_every": 0, "preflight": False, "output": folder, "learning": learning, **limits}
    return DPO(coloured_pairs(4), DPOConfig(pairs_per_update=4, **options))


def lightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """A reward that stays on the device."""
    return images.mean(dim=(1, 2, 3))


ALGORITHMS: dict[str, Callable[[str], Any]] = {
    "dpo": _dpo,
    "grpo": lambda folder: GRPO(lightness, PROMPTS, GRPOConfig(**_online(folder))),
    "endpoint": lambda folder: Endpoint(lightness, PROMPTS, EndpointConfig(objective=Nft(), **_online(folder))),
}
