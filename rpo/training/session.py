"""One session of a run: begin or resume in its folder, do updates, save.

What holds at every moment: the state in memory is that of a complete update, and so is every checkpoint on the disk.
"""

import time
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Generic, TypeVar

from torch import nn
from torch.distributed.tensor import DTensor

from rpo.errors import InputError
from rpo.interrupts import uninterrupted
from rpo.training.ahead import Ahead
from rpo.training.checkpoint import (
    RUN,
    Sealed,
    begin_checkpoint,
    beside,
    checkpoint_path,
    checkpoints,
    fault_of,
    remove_leftovers,
    save_checkpoint,
    sealed,
    whole_or_absent,
)
from rpo.training.divided import PARTS, apart, write_parts
from rpo.training.log import MetricLog, cut_metrics
from rpo.training.loop_config import LoopConfig, plain
from rpo.training.optimizer import make_optimizer
from rpo.training.processes import Processes
from rpo.training.randomness import seed_all, undisturbed_randomness
from rpo.training.resume import Identity, versions
from rpo.training.state import Stateful, TrainingState, own_name
from rpo.training.step import Accumulated, Accumulator, NonFiniteLossError

B = TypeVar("B")
Guard = Callable[[dict[str, float]], str | None]
OnUpdate = Callable[[int, dict[str, float]], None]


class Session(Generic[B]):
    """The state of a run, its folder, and the moves that lead from one to the other."""

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        loop: LoopConfig,
        folder: Path,
        processes: Processes,
        *,
        objects: Mapping[str, Stateful],
        identity: Identity,
    ) -> None:
        """Prepare a session that has not begun; see `fit`."""
        self.identity, self.loop, self.folder, self.processes = dict(identity), loop, folder, processes
        self.state = TrainingState(
            params,
            make_optimizer(
                params,
                loop.optimizer,
                lr=loop.learning_rate,
                betas=(loop.adam_beta1, loop.adam_beta2),
                eps=loop.adam_eps,
                weight_decay=loop.weight_decay,
            ),
            ema_decay=loop.ema_decay,
            is_scaled=loop.scale_loss,
            objects=objects,
        )
        self._seconds_before, self._started = 0.0, time.perf_counter()

    @property
    def is_done(self) -> bool:
        """Whether no update is left to do."""
        return self.state.update >= self.loop.updates or self.state.stopped_because is not None

    @property
    def _is_logged(self) -> bool:
        """Whether the last update is one of those that get a line."""
        return self.state.update % self.loop.log_every == 0 or self.state.update == self.loop.updates

    def start(self) -> None:
        """Begin at the newest checkpoint, or at the beginning."""
        seed_all(self.loop.seed + self.processes.index)
        newest = checkpoints(self.folder)[-1:]
        seen = self.processes.gather([path.name for path in newest])
        if any(other != seen[0] for other in seen):
            raise InputError(
                f"the processes see different checkpoints in {self.folder}: {seen}; expected one folder that all of "
                "them share: put it on a file system that every machine mounts"
            )
        if newest:
            faults = self.processes.gather(fault_of(newest[0], share=(self.processes.index, self.processes.count)))
            if any(faults):
                raise InputError(next(filter(None, faults)))
            self.state.load(newest[0], process=self.processes.index, processes=self.processes.count)
            self._seconds_before = self.state.seconds
        if self.processes.is_main:  # from here on the folder is changed
            remove_leftovers(self.folder)
            cut_metrics(self.folder, self.state.update)
        self.state.mark()
        self.state.own_part()  # refuses unsuitable objects before the first update instead of at the first checkpoint

    def train(
        self,
        batches: Iterator[B],
        accumulator: Accumulator[B],
        on_update: OnUpdate | None,
        guard: Guard | None,
        *,
        draws_ahead: bool = False,
    ) -> None:
        """Do the updates that are left; see `fit`."""
        coming, loop, state = Ahead(batches), self.loop, self.state
        log = MetricLog(
            self.folder,
            updates=loop.updates,
            first_update=state.update,
            is_main=self.processes.is_main,
            progress=loop.progress,
            trackers=loop.trackers,
            config=plain(loop),
        )
        with closing(log):
            while not self.is_done:
                try:
                    self._update(coming, accumulator, log, draws_ahead=draws_ahead)
                    log.advance(state.metrics)
                    self._call_hooks(on_update, guard)
                    if state.stopped_because is not None and not self._is_logged:
                        log.write(self._line())
                except NonFiniteLossError:
                    raise
                except BaseException as error:
                    self._rescue(error)
                    raise
                if self.is_done or state.update % loop.checkpoint_every == 0:
                    log.sync()
                    self.save()

    def finish(self) -> Path:
        """Save the end if it is not saved, and leave the averages in the parameters if they are kept."""
        path = self.save()
        if self.state.ema is not None:
            self.state.ema.copy_to_params()
        return path

    def save(self) -> Path:
        """Write the checkpoint of the last complete update, unless it is there; every process has to take part."""
        state = self.state
        own, (shared, divided) = self.processes.gather(state.own_part()), apart(state.shared_parts())
        path = checkpoint_path(self.folder, state.update)
        error: Exception | None = None
        with uninterrupted():
            begun = self._save_divided(path, divided) if divided else None
            if self.processes.is_main:
                same = {"loop": plain(self.loop), "identity": self.identity, "processes": self.processes.count}
                run = {**state.progress(), **same, "versions": versions()}
                parts = {**shared, RUN: run, **{own_name(i): part for i, part in enumerate(own)}}
                try:
                    save_checkpoint(path, parts, keep=self.loop.keep_checkpoints, begun=begun)
                except Exception as caught:
                    error = caught
        self.processes.fail_together(error)
        return path

    def _save_divided(self, path: Path, tensors: Mapping[str, DTensor]) -> Sealed:
        """Have every process write its parts, and sum a share of the files."""
        if any(self.processes.gather(path.exists())):
            return {}
        error: Exception | None = None
        if self.processes.is_main:
            try:
                with whole_or_absent(path):
                    begin_checkpoint(path)
            except Exception as caught:
                error = caught
        self.processes.fail_together(error)
        with whole_or_absent(path):
            folder = beside(path) / PARTS
            write_parts(folder, tensors)
            files = sorted(folder.iterdir())[self.processes.index :: self.processes.count]
            sums = self.processes.gather(sealed(files, below=folder.parent))
        return dict(ChainMap(*sums))

    def _update(self, coming: Ahead[B], accumulator: Accumulator[B], log: MetricLog, *, draws_ahead: bool) -> None:
        state, started = self.state, time.perf_counter()
        is_last = state.update + 1 == self.loop.updates
        done = accumulator.run(
            coming,
            update=state.update + 1,
            scale=state.scale.value,
            scale_may_shrink=state.scale.may_shrink,
            meanwhile=coming.make_next if draws_ahead and not is_last else lambda: None,
        )
        if done.problem is not None:
            raise NonFiniteLossError(done.problem, state.update + 1, self.save() if state.update > 0 else None)
        if done.samples * state.update != state.samples:
            raise InputError(
                f"update {state.update + 1} has {done.samples} samples, those before had "
                f"{state.samples // state.update}; expected the same: resume with a micro-batch size and a number of "
                "processes that share out as many, or start in a new folder"
            )
        rate = self.loop.rate(state.update)
        now = time.perf_counter()
        with uninterrupted():
            state.commit(
                learning_rate=rate,
                is_finite=done.has_finite_gradient,
                samples=done.samples,
                metrics=self._metrics(done, rate, now - started),
                seconds=self._seconds_before + now - self._started,
            )
            if self._is_logged:
                log.write(self._line())

    def _metrics(self, done: Accumulated, rate: float, seconds: float) -> dict[str, float]:
        metrics = {**done.metrics, "loop/learning_rate": rate}
        if self.state.scale.is_dynamic:
            metrics["loop/loss_scale"] = self.state.scale.value
            metrics["loop/skipped"] = 0.0 if done.has_finite_gradient else 1.0
        return {**metrics, "loop/update_seconds": seconds, "loop/samples_per_second": done.samples / seconds}

    def _line(self) -> dict[str, float]:
        state = self.state
        return {"update": state.update, "samples": state.samples, "seconds": state.seconds, **state.metrics}

    def _call_hooks(self, on_update: OnUpdate | None, guard: Guard | None) -> None:
        if on_update is None and guard is None:
            return
        with undisturbed_randomness(self.state.device):
            if on_update is not None:
                on_update(self.state.update, dict(self.state.metrics))
            if guard is not None:
                self.state.stopped_because = guard(dict(self.state.metrics))
        self.state.mark()

    def _rescue(self, error: BaseException) -> None:
        """Save the last complete update before `error` ends the session."""
        if self.processes.count > 1 or self.state.update == 0 or not self.state.is_whole:
            return
        try:
            path = self.save()
        except OSError as failure:
            error.add_note(f"The last complete update could not be kept: {failure}")
        else:
            error.add_note(f"The state after {self.state.update} updates is kept in {path}; resume continues there.")
