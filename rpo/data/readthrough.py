"""Memory over disk over an encoder: what is asked for is looked up in this order, and kept on the way back.

Fresh entries are stored chunk by chunk, each in one transaction, in the order of the requests. A run that was killed
therefore finds whole chunks when it repeats its requests, and encodes the rest as an undisturbed run would.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from rpo.data.store import TensorStore

Request = TypeVar("Request")
Progress = Callable[[int, int], object]
"""Called with (entries present, entries in all)."""


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
        memory_bytes: int,
    ) -> None:
        """Wire the layers.

        Args:
            store: The disk.
            key_of: Everything that determines the entry of a request, as bytes.
            name_of: What messages call a request.
            encode: Makes the entries of at most `chunk_size` requests, one row each, from what `read` gave.
            read: What the encoder needs of them; `prefetch` has it done for the next chunk while it encodes one.
            dtype: What is stored and returned; fresh entries are rounded to it too, so that a hit equals a miss.
            chunk_size: Entries stored in one transaction.
            memory_bytes: Size of the memory layer; the least recently used entries leave it first.
        """
        self.store = store
        self.encoded = 0
        self.hits = 0
        self._key_of, self._name_of, self._encode, self._read = key_of, name_of, encode, read
        self._dtype, self._chunk_size, self._memory_bytes = dtype, chunk_size, memory_bytes
        self._memory: OrderedDict[bytes, Tensor] = OrderedDict()
        self._used_bytes = 0
        self._lock = threading.Lock()  # a thread that prepares the next batch may share the cache

    def fetch(self, requests: Sequence[Request]) -> Tensor:
        """One row for each request, in order.

        Args:
            requests: At least one; their entries have one shape.
        """
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
        """Make the entries that are missing, without reading those that are there.

        Args:
            requests: Any number.
            progress: Called after every chunk.
        """
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
        found = {key: self._memory[key] for key in keys if key in self._memory}
        for key in found:
            self._memory.move_to_end(key)
        from_disk = self.store.load([key for key in keys if key not in found])
        self._remember(from_disk)
        return found | from_disk

    def _make(self, items: Sequence[tuple[bytes, Request]], read: Any) -> dict[bytes, Tensor]:
        requests = [request for _, request in items]
        rows = self._encode(read).detach().to(device="cpu", dtype=self._dtype)
        if len(rows) != len(requests):
            raise ValueError(f"the encoder gave {len(rows)} entries for {len(requests)} requests; expected one each")
        self._refuse_non_finite(rows, requests)
        fresh = {key: row.clone() for (key, _), row in zip(items, rows, strict=True)}
        self.store.save(fresh)
        self.encoded += len(fresh)
        self._remember(fresh)
        return fresh

    def _refuse_non_finite(self, rows: Tensor, requests: Sequence[Request]) -> None:
        finite = rows.isfinite().flatten(start_dim=1).all(dim=1).tolist()
        bad = [self._name_of(request) for request, good in zip(requests, finite, strict=True) if not good]
        if bad:
            raise ValueError(
                f"encoding {', '.join(bad)} gave numbers that are not finite in {self._dtype}; expected finite ones; "
                "compute and store in float32"
            )

    def _remember(self, fresh: dict[bytes, Tensor]) -> None:
        for key, tensor in fresh.items():
            self._memory[key] = tensor
            self._used_bytes += tensor.nbytes
        while self._used_bytes > self._memory_bytes:
            _, oldest = self._memory.popitem(last=False)
            self._used_bytes -= oldest.nbytes
