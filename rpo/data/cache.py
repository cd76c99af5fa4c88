"""Tensors that are made once: memory over disk over an encoder, asked in this order and filled on the way back.

Fresh entries are stored chunk by chunk, each in one transaction, in the order of the requests. A run that was killed
therefore finds whole chunks when it repeats its requests, and encodes the rest as an undisturbed run would. Entries are
made when they are first asked for, so that a cache never costs more than encoding at every step would.
"""

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
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
_CHUNK = 16  # entries made between two writes, or a whole batch: enough to keep several decoding threads busy


@final
class Memory:
    """Tensors at hand, up to a number of bytes; caches share one, so that a process has one budget.

    They lie in arrays of numpy: torch aligns what it allocates, and the gaps that let go of make do not fit again.
    """

    def __init__(self, mib: float = 1024) -> None:
        """Hold nothing yet; all that a tensor costs counts, and the least recently used leave first."""
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
        """Have a tensor at hand from now on; no two tensors have one key, whichever cache they are of."""
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


class TensorCache(ABC, Generic[Request]):
    """Answers requests for tensors, making each tensor once; what a request is and how it is made, subclasses say."""

    def __init__(
        self, file: Path, *, dtype: torch.dtype = torch.float32, batch_size: int = 1, memory: Memory | None = None
    ) -> None:
        """Open or create the cache.

        Args:
            file: It may serve several models and runs.
            dtype: What is stored and returned; fresh entries are rounded to it too, so that a hit equals a miss.
            batch_size: Entries made in one call. More than 1 is faster, but the last bits of a convolution or a matrix
                product change with it (1e-6 in the latents of a small autoencoder), so that an entry then depends on
                its company, and training on how full the cache was.
            memory: Entries at hand beside the file; None for a memory of its own.
        """
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; expected a positive number; 1 gives reproducible entries")
        self.encoded = 0
        """Entries made since this cache was opened."""
        self.hits = 0
        """Requests answered without making one."""
        self._store, self._dtype, self._batch_size = TensorStore(file), dtype, batch_size
        self._chunk_size = batch_size * max(1, _CHUNK // batch_size)
        self._memory = memory or Memory()
        self._lock = threading.Lock()  # a thread that prepares the next batch may share the cache

    @abstractmethod
    def _key_of(self, request: Request) -> bytes:
        """All that determines the entry of a request: a changed input is another key, so that no hit is stale."""

    @abstractmethod
    def _name_of(self, request: Request) -> str:
        """What messages call it."""

    @abstractmethod
    def _encode(self, read: Any) -> Tensor:
        """One row for each request, made from what `_read` gave."""

    def _read(self, requests: Sequence[Request]) -> Any:
        """What the encoder needs of a chunk; while one is encoded, `prefetch` has the next one read."""
        return requests

    def fetch(self, requests: Sequence[Request]) -> Tensor:
        """One row for each request, in order; what is missing is made and kept."""
        with self._lock:
            by_key = {self._key_of(request): request for request in reversed(requests)}  # the first of equals names it
            keys = [self._key_of(request) for request in requests]
            found = self._look_up(list(dict.fromkeys(keys)))
            missing = [key for key in dict.fromkeys(keys) if key not in found]
            self.hits += len(keys) - len(missing)
            for chunk in self._chunks(missing, by_key):
                found |= self._make(chunk, self._read(list(chunk.values())))
            return torch.stack([found[key] for key in keys])

    def prefetch(self, requests: Sequence[Request], *, progress: Progress | None = None) -> None:
        """Make what is missing of many requests; when interrupted, the next call goes on where this one ended."""
        with self._lock:
            by_key = {self._key_of(request): request for request in reversed(requests)}
            ordered = list(reversed(by_key))
            present = self._store.present(ordered)
            done, chunks = len(present), self._chunks([key for key in ordered if key not in present], by_key)
            with ThreadPoolExecutor(1) as reader:
                reads = [reader.submit(self._read, list(chunk.values())) for chunk in chunks[:1]]
                for number, chunk in enumerate(chunks, start=1):
                    read = reads.pop().result()
                    reads += [reader.submit(self._read, list(one.values())) for one in chunks[number : number + 1]]
                    done += len(self._make(chunk, read))
                    if progress is not None:
                        progress(done, len(ordered))

    def close(self) -> None:
        """Let go of the file."""
        self._store.close()

    def _chunks(self, keys: Sequence[bytes], by_key: dict[bytes, Request]) -> list[dict[bytes, Request]]:
        size = self._chunk_size
        return [{key: by_key[key] for key in keys[start : start + size]} for start in range(0, len(keys), size)]

    def _look_up(self, keys: Sequence[bytes]) -> dict[bytes, Tensor]:
        found = {key: tensor for key in keys if (tensor := self._memory.get(key)) is not None}
        return found | self._remembered(self._store.load([key for key in keys if key not in found]))

    def _make(self, chunk: dict[bytes, Request], read: Any) -> dict[bytes, Tensor]:
        rows = self._encode(read).detach().to(device="cpu", dtype=self._dtype)
        if len(rows) != len(chunk):
            raise InputError(f"the encoder gave {len(rows)} entries for {len(chunk)} requests; expected one each")
        finite = rows.isfinite().flatten(start_dim=1).all(dim=1).tolist()
        bad = [self._name_of(request) for request, good in zip(chunk.values(), finite, strict=True) if not good]
        if bad:
            raise InputError(
                f"encoding {', '.join(bad)} gave numbers that are not finite in {self._dtype}; expected finite ones; "
                "compute and store in float32"
            )
        fresh = dict(zip(chunk, rows, strict=True))
        self._store.save(fresh)
        self.encoded += len(fresh)
        return self._remembered(fresh)

    def _remembered(self, tensors: dict[bytes, Tensor]) -> dict[bytes, Tensor]:
        for key, tensor in tensors.items():
            self._memory.keep(key, tensor)
        return tensors
