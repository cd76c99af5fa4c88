"""A set of 64-bit numbers at 8 bytes each, to know what came before among tens of millions."""

import hashlib
from typing import final

import numpy as np

_FEW, _SHARE = 65536, 16  # what came in since is sorted in when it is more than either: so many, this part of all


@final
class Keys:
    """Numbers that were added: those of long ago in a sorted array, the newest in a small set."""

    def __init__(self) -> None:
        """Begin with none."""
        self._known, self._new = np.empty(0, np.uint64), set[int]()

    def __len__(self) -> int:
        """How many there are."""
        return len(self._known) + len(self._new)

    def add(self, key: int) -> bool:
        """Add a number; whether it is new."""
        at = int(np.searchsorted(self._known, np.uint64(key)))
        if key in self._new or (at < len(self._known) and int(self._known[at]) == key):
            return False
        self._new.add(key)
        if len(self._new) > max(_FEW, len(self._known) // _SHARE):
            self._known = np.union1d(self._known, np.fromiter(self._new, np.uint64, len(self._new)))
            self._new = set()
        return True


def key_of(text: str) -> int:
    """64 bits that stand for a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
