"""The meta device in the place of a GPU: its tensors have no numbers, so that whoever reads one there fails.

Operations check shapes and that tensors lie together, as on a GPU. What comes from the host is counted: on a GPU such a
copy waits, unless it is from page-locked memory.
"""

import dataclasses
import traceback
from collections import Counter
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rpo.adapters.lora import lora_parameters
from rpo.models import execution

META = torch.device("meta")
ROOT = Path(__file__).parent.parent

MAKERS = {torch.tensor, torch.as_tensor, torch.Tensor.new_tensor}
"""What copies numbers from the host without an operation that a dispatcher sees."""


def there(value):
    """The same on the meta device, whatever holds tensors."""
    if isinstance(value, torch.Tensor):
        return value.to(META)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{one.name: there(getattr(value, one.name)) for one in dataclasses.fields(value)}
        )
    if isinstance(value, Mapping):
        return {key: there(one) for key, one in value.items()}
    return value


def denoiser_there(model):
    """Move what computes, and give the parameters of its adapter, which are others then."""
    model.denoiser.to(META)
    return lora_parameters(model.denoiser)


def innermost(stack):
    """The innermost line of the package, as file and function."""
    own = [frame for frame in stack if frame.filename.startswith(f"{ROOT}/rpo/")]
    return f"{Path(own[-1].filename).relative_to(ROOT / 'rpo')} {own[-1].name}" if own else "elsewhere"


class _Copies(TorchDispatchMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to_copy = func.overloadpacket is torch.ops.aten._to_copy
        if to_copy and args[0].device.type == "cpu" and torch.device(kwargs.get("device") or "cpu") == META:
            self.found[innermost(traceback.extract_stack())] += 1
        return func(*args, **kwargs)


class _Made(TorchFunctionMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if (
            func in MAKERS
            and result.device == META
            and not (func is torch.as_tensor and isinstance(args[0], torch.Tensor))
        ):
            self.found[innermost(traceback.extract_stack())] += 1
        return result


@contextmanager
def uploads():
    """Counts what is copied from the host inside, by file and function."""
    found = Counter()
    with pytest.MonkeyPatch.context() as patch, _Copies(found), _Made(found):
        patch.setattr(execution, "computing_in", lambda *_: nullcontext())  # autocast knows no such device
        yield found


@contextmanager
def reads():
    """Counts lists that are read off the meta device inside; each is of ones."""
    found, own = Counter(), torch.Tensor.tolist

    def tolist(tensor):
        if tensor.device != META:
            return own(tensor)
        found[innermost(traceback.extract_stack())] += 1
        return own(torch.ones(tensor.shape))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", tolist)
        yield found
