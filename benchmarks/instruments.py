"""What the benchmarks measure with: counters of calls and of bytes kept for backward, and a clock that tells in units.

A unit U is one forward of the bare denoiser for one image. It is timed between the iterations, so that a machine that
is slow for a while is slow for both; on the CPU in processor seconds of this process, on a GPU in seconds.
"""

import resource
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from rpo.adapters.lora import adapter_layers, add_lora, reference
from rpo.models.checkpoint import Checkpoint

GIB = 2**30
UNIT_CALLS = 3
"""Batches of forwards of which a unit is the mean."""


class Calls:
    """Counts what goes through each network inside `counting`."""

    def __init__(self, model: Checkpoint):
        """Hook the networks of a model.

        Args:
            model: Whose denoiser, image decoder and text encoder are counted.
        """
        self.counts: Counter[str] = Counter()
        self._is_on = False
        texts = [(network, "text") for network in model.text_encoders.values()]
        for network, name in ((model.denoiser, "forward"), (model.vae.decoder, "decode"), *texts):
            network.register_forward_pre_hook(partial(self._before, name), with_kwargs=True)
        model.denoiser.conv_out.register_full_backward_hook(self._backward)

    @contextmanager
    def counting(self, *, is_on: bool = True) -> Iterator[None]:
        """Inside, calls count, or do not."""
        before, self._is_on = self._is_on, is_on
        try:
            yield
        finally:
            self._is_on = before

    def _before(self, name: str, _: nn.Module, args: tuple, kwargs: dict) -> None:
        rows = (args[0] if args else kwargs["input_ids"]).shape[0]
        self._add(name, rows)
        if name == "forward" and torch.is_grad_enabled():
            self._add("forward_with_graph", rows)

    def _backward(self, _: nn.Module, __: Any, outputs: tuple[Tensor, ...] | Tensor) -> None:
        self._add("backward", outputs[0].shape[0])

    def _add(self, name: str, rows: int) -> None:
        if self._is_on:
            self.counts[f"{name}_calls"] += 1
            self.counts[f"{name}_images"] += rows


class GraphMemory:
    """Bytes that are kept for a backward, weights aside.

    Attributes:
        bytes: Kept now.
        peak: Most that were ever kept.
    """

    def __init__(self, weights: Iterable[nn.Parameter]):
        """Prepare.

        Args:
            weights: Do not count; they are there anyway.
        """
        self.bytes = self.peak = 0
        self._weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self._holders: Counter[int] = Counter()

    def watch(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Inside, what is kept for a backward counts until it is let go."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved.tensor)

    def _pack(self, tensor: Tensor) -> "_Saved":
        saved, storage = _Saved(tensor), tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in self._weights:
            self._hold(place, size, 1)
            weakref.finalize(saved, self._hold, place, size, -1)
        return saved

    def _hold(self, place: int, size: int, by: int) -> None:
        before = self._holders[place]
        self._holders[place] += by
        if (before == 0) != (before + by == 0):
            self.bytes += by * size
            self.peak = max(self.peak, self.bytes)


class _Saved:
    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class UnitClock:
    """Times iterations, and the unit before and after each.

    Attributes:
        seconds: Of each iteration.
        unit: Seconds of a forward for one image in a batch, around each iteration.
        unit_alone: The same for an image alone.
    """

    def __init__(self, model: Checkpoint, *, images: int):
        """Prepare.

        Args:
            model: With an adapter, which is off in the unit.
            images: In a batch.
        """
        self._model, self._images = model, images
        self._layers = adapter_layers(model.denoiser)
        self._x_t = torch.randn(images, *model.latent_shape(), device=model.device)
        self._timestep = torch.tensor(model.num_train_timesteps // 2, device=model.device)
        self._cond = model.encode_prompts(["a"] * images)
        self.seconds: list[float] = []
        self.unit: list[float] = []
        self.unit_alone: list[float] = []

    def start(self) -> None:
        """Take the unit, and begin an iteration."""
        self._take_units()
        self._started = now(self._model.device)

    def lap(self) -> None:
        """An iteration has ended; another begins after the unit."""
        self.seconds.append(now(self._model.device) - self._started)
        self.start()

    def in_units(self, skip: int, *, alone: bool = False) -> float:
        """Median of an iteration in units, each of which is the mean of the two around it.

        Args:
            skip: Iterations at the start that do not count.
            alone: Whether in the unit of an image alone.
        """
        units = self.unit_alone if alone else self.unit
        pairs = zip(units, units[1:], strict=False)
        ratios = [2 * own / (a + b) for own, (a, b) in zip(self.seconds, pairs, strict=True)]
        return median(ratios[skip:])

    def _take_units(self) -> None:
        with reference(self._model.denoiser, self._layers):
            self.unit.append(self._forward_seconds(self._images))
            self.unit_alone.append(self._forward_seconds(1))

    def _forward_seconds(self, images: int) -> float:
        x_t, cond = self._x_t[:images], self._cond.select(slice(images))
        forward = partial(self._model.predict, x_t, self._timestep, cond)
        start = now(self._model.device)
        for _ in range(UNIT_CALLS):
            forward()
        return (now(self._model.device) - start) / UNIT_CALLS / images


def prices(model: Checkpoint, *, images: int, rank: int, repeats: int) -> dict[str, float]:
    """What one image costs in each kind of call, in units: "forward", "forward_with_graph", "backward", "decode".

    Args:
        model: Without an adapter, before and after.
        images: In a batch.
        rank: Of the LoRA.
        repeats: Of which the median is taken, after one more to warm up.
    """
    add_lora(model.denoiser, rank=rank)
    clock = UnitClock(model, images=images)
    rows = []
    for _ in range(repeats + 1):
        clock.start()
        rows.append([each / images / clock.unit[-1] for each in _call_seconds(model, images)])
    model.denoiser.zero_grad(set_to_none=True)
    model.pipe.unload_lora_weights()
    names = ("forward", "forward_with_graph", "backward", "decode")
    return {name: median(column) for name, column in zip(names, zip(*rows[1:], strict=True), strict=True)}


def _call_seconds(model: Checkpoint, images: int) -> list[float]:
    x_t = torch.randn(images, *model.latent_shape(), device=model.device)
    timestep = torch.tensor(model.num_train_timesteps // 2, device=model.device)
    cond = model.encode_prompts(["a"] * images)
    times = [now(model.device)]
    with torch.no_grad():
        model.predict(x_t, timestep, cond)
        times.append(now(model.device))
    live = model.predict(x_t, timestep, cond)
    times.append(now(model.device))
    live.square().mean().backward()
    times.append(now(model.device))
    model.decode(x_t)
    times.append(now(model.device))
    return [end - start for start, end in pairwise(times)]


def now(device: torch.device) -> float:
    """Processor seconds of this process, or seconds at which a GPU is done."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def forget_peak_memory(device: torch.device) -> None:
    """Begin `peak_memory_gib` anew, where the system can (Linux and CUDA)."""
    if device.type == "cpu":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", "utf-8")
    else:
        torch.cuda.reset_peak_memory_stats()


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this process has had, on its device."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    return torch.cuda.max_memory_allocated() / GIB
