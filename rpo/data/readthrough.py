"""Memory over disk over an encoder: what is asked for is looked up in this order, and kept on the way back.

Fresh entries are stored chunk by chunk, each in one transaction, in the order of the requests. A run that was killed
therefore finds whole chunks when it repeats its requests, and encodes the rest as an undisturbed run would.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar, final

import numpy as np
import torch
from torch import Tensor

from rpo.data.store import TensorStore
from rpo.errors import InputError

Request = TypeVar("Request")
Progress = Callable[[int, int], object]
"""Called with (entries present, entries in all)."""


_ENTRY_BYTES = 480  # of a key, an array and its place, beside the numbers


@final
class Memory:
    """Tensors at hand, up to a number of bytes; caches share one, so that a process has one budget.

    They lie in arrays of numpy: torch aligns what it allocates, and the gaps that let go of make do not fit again.
    """

    def __init__(self, mib: float = 1024) -> None:
        """Hold nothing yet.

        Args:
            mib: Size, all that a tensor costs included; the least recently used leave first.
        """
        self._held: OrderedDict[Hashable, tuple[np.ndarray, torch.dtype]] = OrderedDict()
        self._bytes = self._free_bytes = mib * 2**20
        self._lock = threading.Lock()

    def __contains__(self, key: Hashable) -> bool:
        """Whether a tensor is at hand."""
        return key in self._held

    def get(self, key: Hashable) -> Tensor | None:
        """A tensor, if it is at hand; not to be written to."""
        with self._lock:
            if key not in self._held:
                return None
            self._held.move_to_end(key)
            held, dtype = self._held[key]
        return torch.from_numpy(held).view(dtype)

    def keep(self, key: Hashable, tensor: Tensor) -> None:
        """Have a tensor at hand from now on.

        Args:
            key: No two tensors have one, whichever cache they are of.
        """
        size = tensor.nbytes + _ENTRY_BYTES
        with self._lock:
            if key in self._held or size > self._bytes:
                return
            while size > self._free_bytes:
                _, (oldest, _) = self._held.popitem(last=False)
                self._free_bytes += oldest.nbytes + _ENTRY_BYTES
                del oldest  # before anything is allocated, so that its place serves again
            self._held[key] = tensor.contiguous().view(torch.uint8).numpy().copy(), tensor.dtype
            self._free_bytes -= size


class ReadThrough(Generic[Request]):
    """Answers requests for tensors, making each tensor once."""

    def __init__(
        self,
        store: TensorStore,
        *,
        key_of: Callable[[Request], bytes],
        name_of: Callable[[Request], str],
        encode: Callable[[Any], Tensor],
        read: Callable[[Sequence[Request]], Any] = list,
        dtype: torch.dtype,
        chunk_size: int,
        memory: Memory,
    ) -> None:
        """Wire the layers.

        Args:
            key_of: Everything that determines the entry of a request, as bytes.
            encode: Makes the entries of at most `chunk_size` requests, one row each, from what `read` gave.
            read: What the encoder needs of them; `prefetch` has it done for the next chunk while it encodes one.
            dtype: What is stored and returned; fresh entries are rounded to it too, so that a hit equals a miss.
        """
        self.store = store
        self.encoded = 0
        self.hits = 0
        self._key_of, self._name_of, self._encode, self._read = key_of, name_of, encode, read
        self._dtype, self._chunk_size, self._memory = dtype, chunk_size, memory
        self._lock = threading.Lock()  # a thread that prepares the next batch may share the cache

    def fetch(self, requests: Sequence[Request]) -> Tensor:
        """One row for each request, in order."""
        with self._lock:
            by_key = {self._key_of(request): request for request in reversed(requests)}  # the first of equals names it
            keys = [self._key_of(request) for request in requests]
            found = self._look_up(list(dict.fromkeys(keys)))
            missing = [key for key in dict.fromkeys(keys) if key not in found]
            self.hits += len(keys) - len(missing)
            for chunk in self._chunks(missing):
                items = [(key, by_key[key]) for key in chunk]
                found |= self._make(items, self._read([request for _, request in items]))
            return torch.stack([found[key] for key in keys])

    def prefetch(self, requests: Sequence[Request], progress: Progress | None) -> None:
        """Make the entries that are missing, without reading those that are there."""
        with self._lock:
            by_key = {self._key_of(request): request for request in reversed(requests)}
            ordered = list(reversed(by_key))
            present = self.store.present(ordered)
            missing = [key for key in ordered if key not in present]
            done = len(present)
            for items, read in self._read_ahead(
                [[(key, by_key[key]) for key in chunk] for chunk in self._chunks(missing)]
            ):
                done += len(self._make(items, read))
                if progress is not None:
                    progress(done, len(ordered))

    def _read_ahead(
        self, chunks: Sequence[list[tuple[bytes, Request]]]
    ) -> Iterator[tuple[list[tuple[bytes, Request]], Any]]:
        """Every chunk with what was read for it; the next is read meanwhile."""
        with ThreadPoolExecutor(1) as reader:
            read = [reader.submit(self._read, [request for _, request in items]) for items in chunks[:1]]
            for place, items in enumerate(chunks):
                current = read.pop().result()
                following = chunks[place + 1 : place + 2]
                read = [reader.submit(self._read, [request for _, request in items]) for items in following]
                yield items, current

    def _chunks(self, keys: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
        return (keys[start : start + self._chunk_size] for start in range(0, len(keys), self._chunk_size))

    def _look_up(self, keys: Sequence[bytes]) -> dict[bytes, Tensor]:
        found = {key: tensor for key in keys if (tensor := self._memory.get(key)) is not None}
        from_disk = self.store.load([key for key in keys if key not in found])
        self._remember(from_disk)
        return found | from_disk

    def _make(self, items: Sequence[tuple[bytes, Request]], read: Any) -> dict[bytes, Tensor]:
        requests = [request for _, request in items]
        rows = self._encode(read).detach().to(device="cpu", dtype=self._dtype)
        if len(rows) != len(requests):
            raise InputError(f"the encoder gave {len(rows)} entries for {len(requests)} requests; expected one each")
        self._refuse_non_finite(rows, requests)
        fresh = {key: row for (key, _), row in zip(items, rows, strict=True)}
        self.store.save(fresh)
        self.encoded += len(fresh)
        self._remember(fresh)
        return fresh

    def _refuse_non_finite(self, rows: Tensor, requests: Sequence[Request]) -> None:
        finite = rows.isfinite().flatten(start_dim=1).all(dim=1).tolist()
        bad = [self._name_of(request) for request, good in zip(requests, finite, strict=True) if not good]
        if bad:
            raise InputError(
                f"encoding {', '.join(bad)} gave numbers that are not finite in {self._dtype}; expected finite ones; "
                "compute and store in float32"
            )

    def _remember(self, fresh: dict[bytes, Tensor]) -> None:
        for key, tensor in fresh.items():
            self._memory.keep(key, tensor)
