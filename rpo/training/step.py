"""One update up to the optimizer: micro-batches in, one averaged and clipped gradient out.

Three things are settled here, before anything is changed: that every micro-batch has the same number of samples (an
update that silently sees fewer is the classic accumulation trap), that all processes agree on the numbers, and that
loss and gradient are finite. The host waits for the device once, to read all numbers of the update together.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from rpo.devices import own_part
from rpo.errors import InputError
from rpo.training.gradients import FlatGradients
from rpo.training.log import check_metric_names
from rpo.training.loop_config import LoopConfig
from rpo.training.processes import Processes
from rpo.types import StepOutput

B = TypeVar("B")
_NAMED_RECORDS = 8


@dataclass(frozen=True)
class NotFinite:
    """Why an update must not be applied: what is not finite, and the records that it was computed from."""

    what: str
    records: list[str]
    cause: Literal["weights", "all", "some"]
    """Whether the trained weights were broken before, or all records of the update are, or some alone."""
    metrics: list[str]
    """What else of the update is not finite: what the loss is made of."""


_ADVICE = {
    "weights": "the trained weights are not finite themselves, so that no record is to blame: start anew from weights "
    "that are",
    "all": "these are all records of the update, so that hardly one of them is to blame: look for weights of the base "
    "that are not finite, or for a beta or another weight that is far too large, and start anew, with a "
    "lower learning rate if these are sound",
    "some": "repair or remove these records and resume, or start anew with a lower learning rate",
}


class NonFiniteLossError(InputError):
    """A loss or a gradient is not finite; the update was not applied and the state before it is saved."""

    def __init__(self, problem: NotFinite, update: int, checkpoint: Path | None) -> None:
        """Say what is broken, where, and where the state before it is.

        Args:
            checkpoint: Where the state before it lies, if there is any.
        """
        self.records, self.update, self.checkpoint = problem.records, update, checkpoint
        named = ", ".join(repr(name) for name in problem.records[:_NAMED_RECORDS])
        more = f" and {unnamed} more" if (unnamed := len(problem.records) - _NAMED_RECORDS) > 0 else ""
        parts = f", nor are {', '.join(problem.metrics)}" if problem.metrics else ""
        kept = "nothing was trained before it" if checkpoint is None else f"the state before it is kept in {checkpoint}"
        super().__init__(
            f"the {problem.what} of update {update} is not finite{parts}, for the records {named}{more}; expected "
            f"finite numbers: {_ADVICE[problem.cause]}. The update was not applied; {kept}"
        )


@dataclass(frozen=True)
class Accumulated:
    """An update ready to be applied: its metrics, mean over micro-batches and processes, and whether it is sound."""

    metrics: dict[str, float]
    samples: int
    problem: NotFinite | None

    @property
    def has_finite_gradient(self) -> bool:
        """Whether the gradient norm is a number; only fp16 goes on without."""
        return math.isfinite(self.metrics["loop/grad_norm"])


@dataclass(frozen=True)
class _MicroBatch:
    """What is kept of a micro-batch after its backward, on the device."""

    numbers: Tensor
    sample_losses: Tensor
    records: list[str]


class Accumulator(Generic[B]):
    """Turns `accumulate` micro-batches into one gradient, the same on every process."""

    def __init__(
        self,
        loss_fn: Callable[[B], StepOutput],
        names: Callable[[B], Sequence[str]],
        *,
        gradients: FlatGradients,
        processes: Processes,
        loop: LoopConfig,
    ) -> None:
        """Prepare for micro-batches whose size and metrics the first one sets; `names` must not touch the device."""
        self._loss_fn, self._names = loss_fn, names
        self._gradients, self._processes = gradients, processes
        self._accumulate, self._max_grad_norm = loop.accumulate, loop.max_grad_norm
        self._samples: int | None = None
        self._metric_names: tuple[str, ...] | None = None

    def run(
        self,
        batches: Iterator[B],
        *,
        update: int,
        scale: float,
        scale_may_shrink: bool,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> Accumulated:
        """Draw, differentiate, average, clip and read one update, whose gradient is then in the parameters.

        Args:
            batches: The micro-batches.
            update: Its number, from 1.
            scale: Factor on the loss.
            scale_may_shrink: Whether a gradient that is not finite can be that factor's fault.
            meanwhile: Called when all work was given to the device, before it is waited for.
        """
        self._gradients.clear()
        done = [self._backward(batches, update, part, scale) for part in range(1, self._accumulate + 1)]
        numbers = torch.stack([part.numbers for part in done]).mean(dim=0)
        self._gradients.average(self._processes)
        self._processes.average(numbers)
        self._gradients.divide(scale)
        norm = self._gradients.clip(self._max_grad_norm)
        read = torch.cat([numbers, norm[None]])
        meanwhile()
        loss, samples, *metrics, grad_norm = read.tolist()  # the only wait for the device
        if self._processes.count > 1 and samples != self._samples:
            counts = self._processes.gather(self._samples)
            raise InputError(
                f"the processes have micro-batches of {counts} samples in update {update}; expected the same number in "
                "each, or their mean would favour the small one: give every process the same micro-batch size"
            )
        assert self._samples is not None and self._metric_names is not None
        named = dict(zip(self._metric_names, metrics, strict=True))
        problem = None
        if not math.isfinite(loss):
            problem = self._problem("loss", self._broken_records(done), named)
        elif not (math.isfinite(grad_norm) or scale_may_shrink):
            problem = self._problem("gradient", self._gather([name for part in done for name in part.records]), named)
        return Accumulated(
            {"loop/loss": loss, "loop/grad_norm": grad_norm, **named},
            self._samples * self._accumulate * self._processes.count,
            problem,
        )

    def _backward(self, batches: Iterator[B], update: int, part: int, scale: float) -> _MicroBatch:
        where = f"micro-batch {part} of {self._accumulate} of update {update}"
        try:
            batch = next(batches)
        except StopIteration:
            raise InputError(
                f"the batches ended at {where}; expected {self._accumulate} for each update: draw from an endless "
                "sampler, or ask for fewer updates"
            ) from None
        output, records = self._loss_fn(batch), list(self._names(batch))
        self._check(output, records, where)
        (output.loss * (scale / self._accumulate)).backward()
        # new_full, as new_tensor would copy from the host and wait for the device.
        numbers = [output.loss, output.loss.new_full((), len(records)), *output.metrics.values()]
        return _MicroBatch(
            torch.stack([number.detach().to(self._gradients.flat.dtype) for number in numbers]),
            output.sample_losses.detach(),
            records,
        )

    def _check(self, output: StepOutput, records: list[str], where: str) -> None:
        samples, metric_names = output.sample_losses.shape[0], tuple(output.metrics)
        if self._samples is None or self._metric_names is None:
            check_metric_names(metric_names)
            self._samples, self._metric_names = samples, metric_names
        fault = ""
        if samples != self._samples:
            fault = (
                f"has {samples} samples, but the first one had {self._samples}; expected the same number in each, or "
                "an update would silently see fewer: draw from an endless sampler, or drop the short last one"
            )
        elif len(records) != samples:
            fault = f"has {samples} samples but {len(records)} names; expected one name per sample: correct `names`"
        elif metric_names != self._metric_names:
            now, first = list(metric_names), list(self._metric_names)
            fault = f"has the metrics {now}, but the first one had {first}; return every metric always"
        elif not output.loss.requires_grad:
            fault = (
                "has a loss that does not depend on the parameters; compute it outside `torch.no_grad()` and "
                "`reference()`, with the adapter switched on"
            )
        if fault:
            raise InputError(f"{where} {fault}")

    def _problem(self, what: str, records: list[str], metrics: dict[str, float]) -> NotFinite:
        assert self._samples is not None
        broken = [name for name, value in metrics.items() if not math.isfinite(value)]
        if not all(bool(own_part(weights).isfinite().all()) for weights in self._gradients.params):
            return NotFinite(what, records, "weights", broken)
        num_records = self._samples * self._accumulate * self._processes.count
        return NotFinite(what, records, "all" if len(records) == num_records else "some", broken)

    def _broken_records(self, done: list[_MicroBatch]) -> list[str]:
        marked = [zip(part.records, part.sample_losses.isfinite().tolist(), strict=True) for part in done]
        gathered = self._gather([name for part in marked for name, is_finite in part if not is_finite])
        # A loss can be broken by a term that belongs to no sample; then its whole micro-batch is named.
        return gathered or self._gather(
            [name for part in done if not math.isfinite(part.numbers[0].item()) for name in part.records]
        )

    def _gather(self, records: list[str]) -> list[str]:
        return [name for part in self._processes.gather(records) for name in part]
