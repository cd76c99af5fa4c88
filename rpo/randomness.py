"""Randomness by name: a generator is a function of what it is for, never of what was drawn before."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def keyed_generator(*key: object) -> torch.Generator:
    """A CPU generator whose state is a hash of `key`: the same key is the same randomness, whatever else happened.

    On the CPU so that every device draws the same numbers, and hashed since neighbouring integer seeds give correlated
    Mersenne states.
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Inside, a tensor is float32 and on the CPU unless it says otherwise, whatever the caller set as torch's defaults.

    For what other libraries draw; our own draws name dtype and device.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)
