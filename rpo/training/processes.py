"""Who else trains: this process among all, and the few things they say to each other.

The model is wrapped only to be divided (`rpo.models.sharding`). `fit` sums the gradients over processes once per
update, in one all-reduce of one flat tensor. For a LoRA that is a few megabytes, so there is nothing to gain from
overlapping it with backward, and much to lose: key prefixes, searches for unused parameters, a forward that differs
between sampling and training.
"""

import atexit
import functools
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

# Before there is a group: its functions keep the group of that moment as their default for ever, and torch imports it
# with the first optimizer. A group that cannot be destroyed at the end may abort the process.
import torch.distributed.nn
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rpo.errors import InputError

PATIENCE = timedelta(minutes=30)
"""How long a process waits for another, after which it ends. The main one draws previews and writes checkpoints alone,
and a reward may ask a server that answers one process much later than another; a process that has died is no matter of
patience: `torchrun` ends the others at once, and so does a closed connection."""

_numbers, _places = itertools.count(), list[str]()
"""Where the processes would find each other's last words, for each `ended_together` that they are in: numbered, as all
of them enter the same ones, so that none reads an older word."""

_WRAPS_THE_MODEL = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM, DistributedType.XLA)


class Processes:
    """This process and its peers, as `torchrun` or `accelerate launch` started them; alone without either."""

    def __init__(self) -> None:
        """Join the other processes, if there are any."""
        # Unless told so, accelerate takes processes on a machine without an accelerator for strangers.
        _join_again()
        patience = InitProcessGroupKwargs(timeout=PATIENCE)
        accelerator = Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=[patience])
        check_kind(accelerator.distributed_type)
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != accelerator.num_processes:
            raise InputError(
                f"{launched} processes were launched, but accelerate was set up for {accelerator.num_processes}; "
                "expected all of them: set ACCELERATE_USE_CPU=true to train on CPUs, and do not set up accelerate first"
            )
        # accelerate's launcher of a single process that was told of several names a meeting place for them.
        is_told_of_several = {"ACCELERATE_DYNAMO_BACKEND", "MASTER_ADDR"} <= os.environ.keys()
        if launched == 1 and is_told_of_several and "RANK" not in os.environ:
            raise InputError(
                "accelerate launch was asked for several processes, but has started this one alone, as it does with "
                "--cpu; expected all of them: launch with `torchrun --nproc_per_node N`, or ask for one process"
            )
        self.index: int = accelerator.process_index
        self.count: int = accelerator.num_processes
        if self.count > 1:
            _leave_at_exit()
        self.is_main: bool = accelerator.is_main_process
        # accelerate numbers the CPU by process, which torch does not do for its tensors.
        self.device = torch.device("cpu") if accelerator.device.type == "cpu" else torch.device(accelerator.device)

    def average(self, tensor: Tensor) -> None:
        """Replace a tensor by its mean over the processes, in place."""
        if self.count > 1:
            torch.distributed.all_reduce(tensor)
            tensor.div_(self.count)

    def average_gradients(self, params: Sequence[nn.Parameter]) -> None:
        """Give every process the mean of the gradients; one without a gradient has zero."""
        if self.count > 1:
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in params])
            self.average(flat)
            for param, values in zip(params, flat.split([param.numel() for param in params]), strict=True):
                param.grad = values.view(param.shape)

    def join(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """The tensors of all processes, of one shape, along a dimension in the order of the processes."""
        if self.count == 1:
            return tensor
        own = tensor.detach().to(self.device).contiguous()
        parts = [torch.empty_like(own) for _ in range(self.count)]
        torch.distributed.all_gather(parts, own)
        return torch.cat(parts, dim).to(tensor.device)

    def own(self, joined: Tensor, dim: int = 0) -> Tensor:
        """This process's part of what all have along a dimension."""
        return joined.chunk(self.count, dim)[self.index]

    def any(self, is_so: bool) -> bool:
        """Whether it is so for any process; they all ask."""
        return any(self.gather(is_so))

    def require_same(self, told: Mapping[str, str]) -> None:
        """Refuse, on every process, that they were told different things: they would wait for each other for ever."""
        if self.count == 1:
            return
        everyone = self.gather(dict(told))
        names = dict.fromkeys(name for one in everyone for name in one)
        differing = [name for name in names if len({one.get(name) for one in everyone}) > 1]
        if differing:
            said = "; ".join(f"{name}: {', '.join(str(one.get(name)) for one in everyone)}" for name in differing)
            raise InputError(
                f"the {self.count} processes were told different things ({said}, in the order of the processes); "
                "expected one run on all of them: give every process the same settings, files and code"
            )

    @torch.no_grad()
    def broadcast(self, params: Sequence[nn.Parameter]) -> None:
        """Give every process the main one's parameters, which lie on each process's own device, unless divided."""
        if self.count > 1 and not isinstance(params[0], DTensor):
            if params[0].device != self.device:
                raise InputError(
                    f"the parameters of process {self.index} are on {params[0].device}; expected its own device, "
                    f"{self.device}, since two processes cannot share one: move the pipeline there before training"
                )
            flat = torch.cat([param.reshape(-1) for param in params])
            torch.distributed.broadcast(flat, src=0)
            for param, values in zip(params, flat.split([param.numel() for param in params]), strict=True):
                param.copy_(values.view(param.shape))

    def gather(self, item: Any) -> list[Any]:
        """One item of every process, in the order of the processes."""
        return gather_object([item])

    def fail_together(self, error: Exception | None) -> None:
        """Raise the main process's error, if it has one, in all of them, so that none waits for one that is gone."""
        if self.count > 1:
            (text,) = broadcast_object_list([None if error is None else f"{type(error).__name__}: {error}"])
            if text is not None and not self.is_main:
                raise LostProcessError(f"the main process failed, so this one stops too: {text}")
        if error is not None:
            raise error


class LostProcessError(InputError):
    """Another process of the run has ended, so that this one ends, too; it says why the other has, if that is known."""


@contextmanager
def ended_together(processes: Processes) -> Iterator[None]:
    """Inside, what ends one process is told to the others: none waits for it for ever, and all say the same.

    The word lies in the store by which the processes found each other, where a process looks when a connection is gone.
    """
    _places.append(f"rpo/why a process ended {next(_numbers)}")
    try:
        yield
    except LostProcessError:
        raise
    except Exception as error:
        if processes.count == 1:
            raise
        if _is_of_a_connection(error):
            raise LostProcessError(_word(error)) from error
        with suppress(RuntimeError, ValueError):  # there may be no group any more
            _store().set(_places[-1], f"process {processes.index} of {processes.count} failed, {_in_words(error)}")
        raise
    finally:
        _places.pop()


def _is_of_a_connection(error: Exception) -> bool:
    told = "by peer" in str(error) or "Timed out waiting" in str(error)  # as gloo says it
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and told)


def _word(error: Exception) -> str:
    killed = (
        "another process of this run has ended without a word, as one does that was killed, or hangs, or cannot be "
        f"reached ({_in_words(error)}); expected all of them: look for its own error, and resume from the last "
        "checkpoint, as torchrun --max-restarts … --resume does"
    )
    with suppress(RuntimeError, ValueError):  # the store may have been the other's
        if found := [place for place in _places if _store().check([place])]:
            return f"{_store().get(found[0]).decode()}; so this one stops too"
    return killed


def _in_words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _store() -> torch.distributed.Store:
    return torch.distributed.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]


def _join_again() -> None:
    """Join the others after `torchrun` has started all anew.

    Its store is the same for all attempts (torch 2.13), with the addresses of those that have died, by which gloo waits
    for them in half of all attempts.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or torch.distributed.is_initialized():
        return
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on")
    device = None if on_cpu else torch.accelerator.current_accelerator()
    store, rank, count = next(iter(torch.distributed.rendezvous("env://", timeout=PATIENCE)))
    torch.distributed.init_process_group(
        torch.distributed.get_default_backend_for_device(device or "cpu"),
        store=torch.distributed.PrefixStore(f"attempt {attempt}", store),
        rank=rank,
        world_size=count,
        timeout=PATIENCE,
    )


@functools.cache
def _leave_at_exit() -> None:
    """Take this process out of the group before Python ends: torch may abort a process whose gloo threads still run."""

    def leave() -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    atexit.register(leave)


def check_kind(kind: DistributedType) -> None:
    """Refuse a launcher's setting that expects to own the model."""
    if kind in _WRAPS_THE_MODEL:
        raise InputError(
            f"accelerate was launched with {kind.value}, which shards or wraps the model; expected plain processes, "
            "each with the whole model, their gradients averaged by rpo: launch with `torchrun --nproc_per_node N`"
        )
