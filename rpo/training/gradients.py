"""The gradients of all parameters as one flat tensor.

Every `param.grad` is a view of it, so that averaging over processes is one all-reduce, clipping one norm and one
multiplication, and clearing one fill, whatever the number of parameters. Of parameters that processes have parts of
(`rpo.models.sharding`) it is this process's part, and backward has averaged it already.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rpo.devices import own_part
from rpo.errors import InputError
from rpo.training.processes import Processes


class FlatGradients:
    """Owns the `.grad` of the parameters while it lives; a parameter that no loss reaches has the gradient 0."""

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        """Take over the gradients of the parameters, which are distinct, float32 or wider, and on one device."""
        _check(params)
        self.params = list(params)
        own = [own_part(param) for param in params]
        self.flat = torch.zeros(sum(p.numel() for p in own), dtype=params[0].dtype, device=params[0].device)
        self._views: list[Tensor] = []
        start = 0
        for param, part in zip(self.params, own, strict=True):
            # The parameter's own strides: fused optimizers refuse a gradient laid out otherwise (channels-last).
            view = self.flat.as_strided(part.shape, part.stride(), start)
            self._views.append(view)
            param.grad = view if part is param else _divided(view, param)
            start += part.numel()

    def clear(self) -> None:
        """Set every gradient to zero."""
        self.flat.zero_()

    def average(self, processes: Processes) -> None:
        """Replace every gradient by its mean over the processes."""
        if not isinstance(self.params[0], DTensor):
            processes.average(self.flat)

    def divide(self, divisor: float) -> None:
        """Divide every gradient by a number."""
        if divisor != 1.0:
            self.flat.div_(divisor)

    def clip(self, max_norm: float) -> Tensor:
        """Shorten the gradient to `max_norm` if it is longer, and give its norm before, which stays on the device."""
        both = zip(self.params, self._views, strict=True)
        assert all(p.grad is not None and _is_at(own_part(p.grad), view) for p, view in both), "a .grad was replaced"
        norm = torch.linalg.vector_norm(self.flat)
        if isinstance(first := self.params[0], DTensor):  # copies of one part, of which there are some, are one
            squares = norm.square()
            torch.distributed.all_reduce(squares, group=first.device_mesh.get_group(first.device_mesh.ndim - 1))
            norm = squares.sqrt()
        self.flat.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def release(self) -> None:
        """Give the memory back: no parameter has a gradient afterwards."""
        for param in self.params:
            param.grad = None
        self._views.clear()


def _is_at(grad: Tensor, view: Tensor) -> bool:
    return grad.data_ptr() == view.data_ptr() and grad.shape == view.shape


def _divided(view: Tensor, param: nn.Parameter) -> Tensor:
    assert isinstance(param, DTensor)
    place = {"shape": param.shape, "stride": param.stride(), "run_check": False}
    return DTensor.from_local(view, param.device_mesh, param.placements, **place)


def _check(params: Sequence[nn.Parameter]) -> None:
    if not params:
        raise InputError("params is empty; expected the parameters to train: add an adapter or unfreeze some first")
    if len({id(param) for param in params}) != len(params):
        raise InputError("params holds a parameter twice; expected each once: remove duplicates of shared weights")
    first = params[0]
    for index, param in enumerate(params):
        fault = ""
        if not param.requires_grad:
            fault = "has requires_grad=False; expected trainable parameters: leave it out"
        elif param.dtype not in (torch.float32, torch.float64):
            fault = (
                f"is {param.dtype}; expected float32, because updates are lost in the rounding of a 16-bit weight: "
                "cast what is trained to float32 and let the model's autocast lower it"
            )
        elif (param.dtype, param.device) != (first.dtype, first.device):
            other = f"{first.dtype} on {first.device}"
            fault = (
                f"is {param.dtype} on {param.device}, but params[0] is {other}; expected one of both: move them first"
            )
        if fault:
            raise InputError(f"params[{index}] {fault}")
