"""Where the line of each record is: 16 bytes a record, so that a run may be of any length.

Ids of records are 16 hexadecimal digits, which are a number of 64 bits; of an id of another form it is a hash. What was
known at the start is a sorted array, what comes in while a run is at work a small table that is sorted in now and then.
"""

import hashlib
import re
from array import array
from typing import final

import numpy as np

_OFFSET_BITS = 48
_HEXADECIMAL = re.compile(r"[0-9a-f]{16}")
_FEW = 65536  # entries of the table, at about 130 bytes each; more where that is little beside the array
_SHARE = 16


def place_of(part: int, start: int) -> int:
    """A part and the start of a line in it, as one number."""
    return part << _OFFSET_BITS | start


def part_and_start(place: int) -> tuple[int, int]:
    """The two that a place is made of."""
    return place >> _OFFSET_BITS, place & ((1 << _OFFSET_BITS) - 1)


def key_of(record: str) -> int:
    """The number that a record is found by."""
    if _HEXADECIMAL.fullmatch(record):
        return int(record, 16)
    return int.from_bytes(hashlib.blake2b(record.encode(), digest_size=8).digest())


@final
class Places:
    """Keys to places; of a key that comes again the first place counts. One thread adds, any number look."""

    def __init__(self, keys: "array[int]", places: "array[int]") -> None:
        """Take what is there."""
        self._known = _sorted(np.frombuffer(keys, np.uint64), np.frombuffer(places, np.uint64))
        self._new: dict[int, int] = {}

    def __len__(self) -> int:
        """Number of records."""
        return len(self._known[0]) + len(self._new)

    def get(self, key: int) -> int | None:
        """The place of a record, if there is one."""
        place = self._new.get(key)  # first: what is sorted in is in both for a moment, and never in neither
        if place is not None:
            return place
        keys, places = self._known
        at = int(np.searchsorted(keys, np.uint64(key)))
        return int(places[at]) if at < len(keys) and int(keys[at]) == key else None

    def add(self, key: int, place: int) -> None:
        """Note a record that is not there yet."""
        self._new[key] = place
        if len(self._new) > max(_FEW, len(self._known[0]) // _SHARE):
            new = (np.fromiter(found, np.uint64, len(self._new)) for found in (self._new, self._new.values()))
            self._known = _sorted(*(np.concatenate(both) for both in zip(self._known, new, strict=True)))
            self._new = {}


def _sorted(keys: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    unique, first = np.unique(keys, return_index=True)
    return unique, places[first]
