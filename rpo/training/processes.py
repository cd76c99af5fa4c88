"""Who else trains: this process among all, and the few things they say to each other.

The model is never wrapped. `fit` sums the gradients over processes once per update, in one all-reduce of one flat
tensor. For a LoRA that is a few megabytes, so there is nothing to gain from overlapping it with backward, and much to
lose: key prefixes, searches for unused parameters, a forward that differs between sampling and training.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch import Tensor, nn

_WRAPS_THE_MODEL = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM, DistributedType.XLA)


class Processes:
    """This process and its peers, as `torchrun` or `accelerate launch` started them; alone without either."""

    def __init__(self) -> None:
        """Join the other processes, if there are any."""
        accelerator = Accelerator()
        check_kind(accelerator.distributed_type)
        self.index: int = accelerator.process_index
        self.count: int = accelerator.num_processes
        self.is_main: bool = accelerator.is_main_process
        self.device: torch.device = accelerator.device

    def average(self, tensor: Tensor) -> None:
        """Replace a tensor by its mean over the processes, in place."""
        if self.count > 1:
            torch.distributed.all_reduce(tensor)
            tensor.div_(self.count)

    @torch.no_grad()
    def broadcast(self, params: Sequence[nn.Parameter]) -> None:
        """Give every process the main one's parameters."""
        if self.count > 1:
            flat = torch.cat([param.reshape(-1) for param in params])
            torch.distributed.broadcast(flat, src=0)
            for param, values in zip(params, flat.split([param.numel() for param in params]), strict=True):
                param.copy_(values.view(param.shape))

    def gather(self, item: Any) -> list[Any]:
        """One item of every process, in the order of the processes."""
        return gather_object([item])

    def fail_together(self, error: Exception | None) -> None:
        """Raise the main process's error in all of them, so that none waits for one that is gone.

        Args:
            error: What went wrong on the main process, or nothing; the others' is not looked at.

        Raises:
            error: The error itself on the main process.
            RuntimeError: Its text on the others.
        """
        if self.count > 1:
            (text,) = broadcast_object_list([None if error is None else f"{type(error).__name__}: {error}"])
            if text is not None and not self.is_main:
                raise RuntimeError(f"the main process failed, so this one stops too: {text}")
        if error is not None:
            raise error


def check_kind(kind: DistributedType) -> None:
    """Refuse a launcher's setting that expects to own the model.

    Args:
        kind: What accelerate was launched as.

    Raises:
        ValueError: If it shards or wraps the model.
    """
    if kind in _WRAPS_THE_MODEL:
        raise ValueError(
            f"accelerate was launched with {kind.value}, which shards or wraps the model; expected plain processes, "
            "each with the whole model, their gradients averaged by rpo: launch with `torchrun --nproc_per_node N`"
        )
