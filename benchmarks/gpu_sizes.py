"""What updates of checkpoints at their real size take, by the public `Trainer`, against what `rpo plan` says of them.

Weights are random, which changes no cost. Of each checkpoint a DPO update and an endpoint update (DiffusionNFT) of a
LoRA in bfloat16: seconds, the peak of memory, the time outside of the denoiser, and the share of the card's dense bf16
rate. The operations are those that the plan counts: what the update needs, not what recomputing adds.
"""

import math
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
from rpo.models.latents import images_per_decode
from rpo.runs.plan import Plan, plan
from rpo.runs.price import price
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

MOST_TFLOP, MOST_MEMORY = 400.0, 0.8
"""Of one update, and the share of the card that its plan may fill."""

PAIRS = ["max_chosen_error_ratio=.inf", "max_rejected_error_ratio=.inf"]

IMAGES = 4
ENDPOINT = [
    "objective.kind=nft",
    "rollout.prompts=2",
    f"rollout.images_per_prompt={IMAGES // 2}",
    "rollout.num_steps=4",
    "rollout.guidance_scale=1.0",
    "steps.train_steps=1",
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
        of_pairs = partial(_config, DPORunConfig, [*words, *PAIRS, f"resolution={side}", f"output={folder}/dpo"])
        one = plan(of_pairs(["pairs_per_update=1", "learning.micro_batch=1"]))
        note("dpo", _measured(model, *_dpo(of_pairs, one, side, setting), setting))
        model.pipe.unload_lora_weights()
        words += [*ENDPOINT, f"rollout.resolution={side}", f"output={folder}/endpoint"]
        note(
            "endpoint", _measured(model, *_endpoint(partial(_config, EndpointRunConfig, words), one, setting), setting)
        )


def _config(made: type[Any], words: list[str], more: list[str]) -> Any:
    return load_config(made, None, [*words, *more])


def _dpo(config: Callable[[list[str]], Any], one: Plan, side: int, setting: Setting) -> tuple[Algorithm[Any], Plan]:
    """With as many pairs as the plan, which is of one, finds room for."""
    wider = [replace(one, rows=2 * pairs, cost=pairs * one.cost) for pairs in (2, 4, 8, 16)]
    told = _widest([one, *(wider if setting.on_gpu else wider[:1])], setting)
    pairs = told.rows // 2
    settings = config([f"pairs_per_update={pairs}", f"learning.micro_batch={pairs}"])
    return DPO(coloured_pairs(pairs, side), part_of(settings, DPOConfig)), told


def _endpoint(config: Callable[[list[str]], Any], one: Plan, setting: Setting) -> tuple[Algorithm[Any], Plan]:
    """By the same counts of single latents, which are not taken again: they need most of the time."""
    pixels = one.canvas.height * one.canvas.width
    cost = price(config([]), one.backward, guided=one.guided)
    every = {"waiting": (), "drawn": IMAGES, "decoded": min(images_per_decode(pixels), IMAGES), "cost": cost}
    told = _widest([replace(one, rows=rows, **every) for rows in (1, 2, IMAGES)], setting)
    settings = config([f"learning.micro_batch={told.rows}", f"rollout.batch_size={IMAGES}"])
    return Endpoint(lightness, ["a red circle", "a house"], part_of(settings, EndpointConfig)), told


def _widest(plans: list[Plan], setting: Setting) -> Plan:
    """The last that fits well into the card and takes seconds on a slow one; or else the first."""
    most = MOST_MEMORY * torch.cuda.mem_get_info(setting.where)[1] if setting.on_gpu else math.inf
    fitting = [told for told in plans if told.peak <= most and _tflop(told) <= MOST_TFLOP]
    return fitting[-1] if fitting else plans[0]


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
