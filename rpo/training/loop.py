"""`fit`: the one training loop. It knows parameters, micro-batches and a loss; it knows no algorithm.

An update is `accumulate` micro-batches, one gradient averaged over all processes, one check that everything is finite,
and one optimizer step. A run is a folder: `metrics.jsonl`, one line per logged update, and `checkpoint-000100`, …, from
which a killed run continues as if nothing had happened, on the CPU to the bit.

Several processes (`torchrun --nproc_per_node N`) train one model: each draws its own micro-batches, the gradients are
averaged once per update. Two processes with half the micro-batch each make the update of one with the whole.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import nn
from tqdm import tqdm

from rpo.training.gradients import FlatGradients
from rpo.training.loop_config import LoopConfig, describe
from rpo.training.processes import Processes, ended_together
from rpo.training.randomness import undisturbed_randomness
from rpo.training.resume import Identity, claimed
from rpo.training.session import Session
from rpo.training.state import Stateful
from rpo.training.step import Accumulator, NonFiniteLossError
from rpo.types import StepOutput

__all__ = ["LoopConfig", "NonFiniteLossError", "TrainResult", "describe", "fit"]

B = TypeVar("B")


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    updates: int
    """Updates done, those of earlier sessions included."""
    stopped_because: str | None
    """What the guard said, if it ended the run."""
    metrics: dict[str, float]
    """Of the last update."""
    folder: Path
    """The run's folder: `metrics.jsonl` and the checkpoints."""
    checkpoint: Path
    """The checkpoint of the last update."""


def fit(
    batches: Callable[[int], Iterator[B]],
    loss_fn: Callable[[B], StepOutput],
    params: Sequence[nn.Parameter],
    loop: LoopConfig,
    *,
    folder: Path,
    names: Callable[[B], Sequence[str]],
    draws_ahead: bool = False,
    resume: bool = False,
    state: Mapping[str, Stateful] | None = None,
    identity: Identity | None = None,
    on_update: Callable[[int, dict[str, float]], None] | None = None,
    guard: Callable[[dict[str, float]], str | None] | None = None,
) -> TrainResult:
    """Train parameters on micro-batches.

    The parameters are trained where they are; nothing is wrapped. Hooks may draw random numbers without changing the
    run. In a single process Ctrl-C, SIGTERM, SIGHUP or an error leaves a checkpoint of the last complete update.

    Args:
        batches: From the number of updates done to this process's micro-batches from there on, all of one size.
        loss_fn: From a micro-batch to its loss, as a mean over its samples.
        folder: Of the run; its own, and the same on every process.
        names: From a micro-batch to the names of its records, one per sample; called for each, so without device work.
        draws_ahead: Make the next micro-batch while the device is busy with the last: where it depends on nothing that
            an update changes, and its making draws no global random numbers.
        resume: Continue from the newest checkpoint in `folder`, if there is one. Without it, `folder` must hold no run.
        state: What else has to survive a kill, by name; copied after every update.
        identity: What a resumed run must have in common with the one that it continues, besides `loop`.
        on_update: Called on every process with the number of updates done and the metrics of the last.
        guard: From an update's metrics to why training ends here, or nothing. A resumed run stays stopped.

    Returns:
        How the run ended. The parameters are those of the last update, or their averages with `ema_decay`.
    """
    processes, folder, same = Processes(), Path(folder), identity or {}
    gradients = FlatGradients(params)
    try:
        with (
            ended_together(processes),
            claimed(folder, loop, same, processes, resume=resume),
            undisturbed_randomness(params[0].device),
        ):
            processes.broadcast(params)  # first, because the session starts an average from them
            session = Session(params, loop, folder, processes, objects=state or {}, identity=same)
            accumulator = Accumulator(loss_fn, names, gradients=gradients, processes=processes, loop=loop)
            session.start()
            if not session.is_done:
                stream = batches(session.state.update)
                session.train(stream, accumulator, on_update, guard, draws_ahead=draws_ahead)
            checkpoint = session.finish()
    finally:
        gradients.release()
    end = session.state
    if end.stopped_because and processes.is_main:
        tqdm.write(f"stopped after update {end.update}: {end.stopped_because}")
    return TrainResult(end.update, end.stopped_because, end.metrics, folder, checkpoint)
