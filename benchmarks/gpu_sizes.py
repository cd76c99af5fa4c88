"""What updates of checkpoints at their real size take, by the public `Trainer`, against what `rpo plan` says of them.

Weights are random, which changes no cost. Of each checkpoint a DPO update and an endpoint update (DiffusionNFT) of a
LoRA in bfloat16: seconds, the peak of memory, the time outside of the denoiser, and the share of the card's dense bf16
rate. The operations are those that the plan counts: what the update needs, not what recomputing adds.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from card import clock, measured_tflops, published_tflops
from gpu_parity import coloured_pairs
from gpu_part import Note, Setting
from gpu_waits import lightness
from instruments import GIB, forget_peak_memory
from real_size import built
from real_sizes import SIZES, in_small, write_configs
from torch import Tensor, nn

from rpo.config.load import load_config
from rpo.models.checkpoint import Checkpoint
from rpo.models.execution import prepare_denoiser
from rpo.runs.plan import Plan, plan
from rpo.runs.train_config import DPORunConfig, EndpointRunConfig, part_of
from rpo.trainers.dpo import DPO
from rpo.trainers.dpo_config import DPOConfig
from rpo.trainers.endpoint import Endpoint
from rpo.trainers.endpoint_config import EndpointConfig
from rpo.trainers.trainer import Algorithm, Trainer
from rpo.types import StepOutput

SIDE = {"sd15": 512, "sdxl": 1024, "sd35_medium": 1024}
SMALL_SIDE = 64

WARM_UP, TIMED = 2, 3

MOST_PAIRS, MOST_TFLOP, MOST_MEMORY = 16, 400.0, 0.8
"""Of one DPO update: as many pairs as fit into so much of the card, and take seconds on a slow one."""

ENDPOINT = [
    "objective.kind=nft",
    "rollout.prompts=2",
    "rollout.images_per_prompt=2",
    "rollout.num_steps=6",
    "rollout.guidance_scale=1.0",
    "rollout.batch_size=4",
    "steps.train_steps=2",
    "learning.micro_batch=4",
    "monitor.every=null",
    "monitor.canaries=false",
]


def measure(name: str, setting: Setting, note: Note) -> None:
    """Both kinds of update of one checkpoint."""
    size, side = (SIZES[name], SIDE[name]) if setting.on_gpu else (in_small(name), SMALL_SIDE)
    dtype = torch.bfloat16 if setting.on_gpu else torch.float32
    note("resolution", side)
    with tempfile.TemporaryDirectory() as folder:
        words = [f"model.source={write_configs(size, Path(folder) / 'configs')}", "preview_every=0", "preflight=false"]
        words += [f"model.dtype={str(dtype).removeprefix('torch.')}", "learning.progress=false"]
        words += [f"learning.{name}={WARM_UP + TIMED}" for name in ("updates", "checkpoint_every")]
        torch.manual_seed(0)
        model = Checkpoint(built(size, dtype, setting.device))
        prepare_denoiser(model.denoiser, compute_dtype=model.compute_dtype)
        note("dpo", _measured(model, *_dpo([*words, f"output={folder}/dpo"], side, setting), setting))
        model.pipe.unload_lora_weights()
        note("endpoint", _measured(model, *_endpoint([*words, f"output={folder}/endpoint"], side), setting))


def _dpo(words: list[str], side: int, setting: Setting) -> tuple[Algorithm[Any], Plan]:
    """With as many pairs as the plan finds room for."""
    words = [*words, f"resolution={side}", "max_chosen_error_ratio=.inf", "max_rejected_error_ratio=.inf"]

    def config(pairs: int) -> DPORunConfig:
        more = [f"pairs_per_update={pairs}", f"learning.micro_batch={pairs}"]
        return load_config(DPORunConfig, None, [*words, *more])

    one = plan(config(1))
    told = one
    for pairs in (2, 4, 8, MOST_PAIRS) if setting.on_gpu else (2,):
        wider = replace(one, rows=2 * pairs, cost=pairs * one.cost)
        fits = wider.peak <= MOST_MEMORY * torch.cuda.mem_get_info()[1] if setting.on_gpu else True
        if not fits or _tflop(wider) > MOST_TFLOP:
            break
        told = wider
    return DPO(coloured_pairs(told.rows // 2, side), part_of(config(told.rows // 2), DPOConfig)), told


def _endpoint(words: list[str], side: int) -> tuple[Algorithm[Any], Plan]:
    config = load_config(EndpointRunConfig, None, [*words, *ENDPOINT, f"rollout.resolution={side}"])
    return Endpoint(lightness, ["a red circle", "a house"], part_of(config, EndpointConfig)), plan(config)


def _tflop(told: Plan) -> float:
    """Of an update, by the plan."""
    return told.cost * told.forward.flops / 1e12


def _measured(model: Checkpoint, algorithm: Algorithm[Any], told: Plan, setting: Setting) -> dict[str, Any]:
    """Seconds, memory and shares of the updates after the first ones."""
    device = setting.where
    if setting.on_gpu:
        torch.cuda.empty_cache()
    forget_peak_memory(device)
    trainer = Trainer(model, algorithm)
    watch = Stopwatch(model.denoiser, trainer.run.policy.parameters, device)
    with watch.on(algorithm):
        trainer.train(on_update=lambda update, metrics: watch.lap())
    seconds, inside = (median(laps[WARM_UP - 1 :]) for laps in (watch.seconds, watch.inside))
    found = {
        "rows": told.rows,
        "tflop": _tflop(told),
        "seconds": seconds,
        "outside_of_denoiser": 1 - inside / seconds,
        "planned_peak_gib": told.peak / GIB,
    }
    rates = {"of_measured": measured_tflops(device)}
    if setting.on_gpu:
        peak = torch.cuda.max_memory_allocated(device)
        found |= {"peak_gib": peak / GIB, "peak_by_plan": peak / told.peak}
        if rate := published_tflops(torch.cuda.get_device_name(device)):
            rates["of_published"] = rate
    return found | {name: found["tflop"] / seconds / rate for name, rate in rates.items()}


class Stopwatch:
    """Tells the time in the denoiser from all of it: its forwards, and the way back from a loss to the last gradient.

    A GPU is asked by events, which nothing waits for until an update has ended.

    Attributes:
        seconds: Of each update after the first, from end to end.
        inside: In the denoiser, of the same.
    """

    def __init__(self, denoiser: nn.Module, parameters: list[nn.Parameter], device: torch.device):
        """Prepare.

        Args:
            denoiser: Whose calls count.
            parameters: What is trained; the last of their gradients ends a backward.
            device: Where that is.
        """
        self._denoiser, self._parameters, self._device = denoiser, parameters, device
        self._spans: list[tuple[Any, Any]] = []
        self._ends: list[float] = []
        self.inside: list[float] = []

    @property
    def seconds(self) -> list[float]:
        """See above."""
        return [later - earlier for earlier, later in pairwise(self._ends)]

    @contextmanager
    def on(self, algorithm: Any) -> Iterator[None]:
        """Inside, forwards count, and the gradients of an algorithm's losses."""
        loss = algorithm.loss
        algorithm.loss = partial(self._timed, loss)
        hooks = [
            self._denoiser.register_forward_pre_hook(lambda *_: self._start()),
            self._denoiser.register_forward_hook(lambda *_: self._stop()),
            *(one.register_post_accumulate_grad_hook(lambda _: self._stop()) for one in self._parameters),
        ]
        try:
            yield
        finally:
            algorithm.loss = loss
            for hook in hooks:
                hook.remove()

    def lap(self) -> None:
        """An update has ended; what comes before the first end does not count."""
        now = clock(self._device)
        if self._ends:
            self.inside.append(sum(_between(*span) for span in self._spans))
        self._spans.clear()
        self._ends.append(now)

    def _timed(self, loss: Callable[[Any], StepOutput], batch: Any) -> StepOutput:
        output = loss(batch)
        output.loss.register_hook(self._backward)
        return output

    def _backward(self, gradient: Tensor) -> None:
        self._start()

    def _start(self) -> None:
        self._spans.append((self._mark(), None))

    def _stop(self) -> None:
        start, end = self._spans[-1]  # of a backward every gradient may be the last
        self._spans[-1] = start, self._mark(end)

    def _mark(self, again: Any = None) -> Any:
        if self._device.type != "cuda":
            return clock(self._device)
        event = again or torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
