"""Everything that training changes, and hence everything that a checkpoint holds.

The parameters move only in `commit`, which also remembers the generators and the caller's own objects as the update
left them. So whatever interrupts the next update, the state of the last complete one can still be written. Only an
optimizer that fails half-way leaves nothing worth keeping: then `is_whole` is false.
"""

import copy
import io
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from rpo.devices import dealt
from rpo.errors import InputError
from rpo.training.checkpoint import RUN, read_part
from rpo.training.divided import PARTS, put_back, read_parts, stored
from rpo.training.ema import ExponentialAverage
from rpo.training.loss_scale import LossScale
from rpo.training.randomness import random_state, set_random_state

WEIGHTS, OPTIMIZER = "weights.pt", "optimizer.pt"
"""Files of a checkpoint."""

_PLAIN = (torch.Tensor, nn.Parameter, bool, int, float, str, bytes, type(None))


class Stateful(Protocol):
    """Something of the caller's that has to survive a kill: a sampler's cursor, running statistics, a rollout."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings and containers of them; copied after every update, so keep it small."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Continue from there."""
        ...


class SharedOut(ABC):
    """A `Stateful` of which every process has a part of its own; that of any other is the same on all of them."""

    @abstractmethod
    def shared_out(self, states: Sequence[dict[str, Any]], process: int, processes: int) -> dict[str, Any]:
        """The state of one of another number of processes, from those of all processes before."""


class WrittenOnce:
    """Marks a `Stateful` whose state nobody writes to once it was handed out, so that no copy is taken of it."""


class TrainingState:
    """Parameters, optimizer, average, loss scale, generators, the caller's objects, and how far the run is."""

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        ema_decay: float | None = None,
        is_scaled: bool = False,
        objects: Mapping[str, Stateful] | None = None,
    ) -> None:
        """Start before the first update."""
        self.params = list(params)
        self.optimizer = optimizer
        self.ema = None if ema_decay is None else ExponentialAverage(self.params, ema_decay)
        self.scale = LossScale(is_scaled)
        self.objects = dict(objects or {})
        self.update = 0
        self.samples = 0
        self.seconds = 0.0
        self.metrics: dict[str, float] = {}
        self.stopped_because: str | None = None
        self.is_whole = True
        self._marked: dict[str, Any] = {}

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.params[0].device

    def commit(
        self, *, learning_rate: float, is_finite: bool, samples: int, metrics: dict[str, float], seconds: float
    ) -> None:
        """Take the optimizer's step along the gradient, unless that is not finite, and count the update as done."""
        snapshot = self._snapshot()
        self.is_whole = False
        if is_finite:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update()
        self.scale.adjust(is_finite)
        self._marked = snapshot
        self.update, self.samples = self.update + 1, self.samples + samples
        self.metrics, self.seconds = metrics, seconds
        self.is_whole = True

    def mark(self) -> None:
        """Remember the generators and the caller's objects as they are now."""
        self._marked = self._snapshot()

    def _snapshot(self) -> dict[str, Any]:
        return {
            "random": random_state(self.device),
            "objects": {
                name: item.state_dict() if isinstance(item, WrittenOnce) else copy.deepcopy(item.state_dict())
                for name, item in self.objects.items()
            },
        }

    def shared_parts(self) -> dict[str, Any]:
        """What is the same on every process, or what they have parts of: a checkpoint's files of tensors."""
        return {
            WEIGHTS: {
                "params": [param.detach() for param in self.params],
                "ema": None if self.ema is None else self.ema.state_dict(),
            },
            OPTIMIZER: self.optimizer.state_dict(),
        }

    def progress(self) -> dict[str, Any]:
        """How far the run is, in plain numbers and strings."""
        return {
            "update": self.update,
            "samples": self.samples,
            "seconds": self.seconds,
            "metrics": self.metrics,
            "stopped_because": self.stopped_because,
            "loss_scale": self.scale.state_dict(),
        }

    def own_part(self) -> bytes:
        """What is this process's alone, as last marked, checked to be readable without executing anything."""
        for name, value in self._marked["objects"].items():
            if foreign := _foreign(value, name):
                raise InputError(
                    f"state {foreign}, which a checkpoint cannot hold; expected tensors, Python numbers, strings, and "
                    "lists, tuples and dicts of them: convert it in its state_dict()"
                )
        buffer = io.BytesIO()
        torch.save(self._marked, buffer)
        return buffer.getvalue()

    def load(self, path: Any, *, process: int, processes: int) -> None:
        """Continue from a verified checkpoint.

        Of another number of processes than wrote it, each continues with the parts that are the same on all, and with
        what is its own of those that know how to share theirs out anew. A process that there was not keeps its global
        generators as they are: seeded, and never used by any.
        """
        run, files = read_part(path, RUN), {name: read_part(path, name) for name in (WEIGHTS, OPTIMIZER)}
        before = run["processes"]
        own = read_part(path, own_name(process if process < before else 0))
        if before != processes:
            every = [own["objects"]]
            if any(isinstance(item, SharedOut) for item in self.objects.values()):
                every = [read_part(path, own_name(index))["objects"] for index in range(before)]
            own["objects"] = self._shared_out(every, process, processes)
        self._load_divided(path / PARTS, files)
        self._load_params(path, files[WEIGHTS]["params"])
        if self.ema is not None:
            self.ema.load_state_dict(files[WEIGHTS]["ema"])
        self.optimizer.load_state_dict(self._dealt(files[OPTIMIZER]))
        self.scale.load_state_dict(run["loss_scale"])
        self.update, self.samples, self.seconds = run["update"], run["samples"], run["seconds"]
        self.metrics, self.stopped_because = run["metrics"], run["stopped_because"]
        self._load_objects(path, own["objects"])
        if process < before:
            set_random_state(own["random"], self.device)

    def _shared_out(self, every: Sequence[dict[str, Any]], process: int, processes: int) -> dict[str, Any]:
        """What the objects of all processes of before come to on one of those of now."""
        found = dict(every[0])
        for name in found.keys() & self.objects.keys():
            if isinstance(item := self.objects[name], SharedOut):
                found[name] = item.shared_out([one[name] for one in every], process, processes)
        return found

    @torch.no_grad()
    def _load_divided(self, folder: Any, files: dict[str, Any]) -> None:
        """Fill in what processes had parts of: read to where it belongs, or to what the optimizer then keeps."""
        known = stored(folder)
        put_back(files, known)
        self._check_shapes(folder.parent, files[WEIGHTS]["params"])
        averages = [] if self.ema is None else self.ema.averages
        into: dict[str, torch.Tensor] = {}
        for place, like in known.items():
            match place.split("/"):
                case [_, "params", number]:
                    into[place] = self.params[int(number)].detach()
                case [_, "ema", _, number]:
                    into[place] = averages[int(number)]
                case [_, _, number, *_]:
                    into[place] = torch.empty_like(self.params[int(number)], dtype=like.dtype)
        read_parts(folder, into)
        put_back(files, into)

    @torch.no_grad()
    def _load_params(self, path: Any, values: Sequence[torch.Tensor]) -> None:
        self._check_shapes(path, values)
        for param, value in zip(self.params, values, strict=True):
            param.copy_(dealt(value, param))

    def _check_shapes(self, path: Any, values: Sequence[torch.Tensor]) -> None:
        found, expected = [tuple(v.shape) for v in values], [tuple(p.shape) for p in self.params]
        if found != expected:
            what = f"{len(found)} parameters, this run trains {len(expected)}"
            if len(found) == len(expected):
                first = next(place for place, one in enumerate(found) if one != expected[place])
                what = f"params[{first}] of shape {found[first]}, this run's has {expected[first]}"
            raise InputError(
                f"{path} holds {what}; expected the same network and adapter: restore their settings, or start in a "
                "new folder"
            )

    def _dealt(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        """An optimizer's state, of which this process has its parts where the parameters are divided."""
        for place, values in optimizer["state"].items():
            param = self.params[place]
            for name, value in values.items():
                if isinstance(value, torch.Tensor) and value.shape == param.shape:
                    values[name] = dealt(value, param)
        return optimizer

    def _load_objects(self, path: Any, states: Mapping[str, dict[str, Any]]) -> None:
        if states.keys() != self.objects.keys():
            raise InputError(
                f"{path} holds the state of {sorted(states)}, this run keeps {sorted(self.objects)}; expected the same "
                "names: pass the same `state`, or start in a new folder"
            )
        for name, item in self.objects.items():
            item.load_state_dict(states[name])


def own_name(process: int) -> str:
    """The file of one process in a checkpoint."""
    return f"process-{process:03d}.pt"


def _foreign(value: Any, path: str) -> str | None:
    """Where in a state something lies that cannot be read back without executing code, and what it is."""
    if type(value) in _PLAIN:
        return None
    if type(value) in (dict, OrderedDict):
        items = [(f"{path}[{key!r}]", part) for key, part in value.items()]
    elif type(value) in (list, tuple):
        items = [(f"{path}[{index}]", part) for index, part in enumerate(value)]
    else:
        return f"{path} is a {type(value).__name__}"
    return next((found for place, part in items if (found := _foreign(part, place))), None)
