"""Where the two images of a pair differ, on the grid of their latents: made once from their pixels and kept on disk.

What is kept is the difference itself, not a mask of it, so that the settings of a mask can change without reading an
image again. No image is read twice for it: `remembering` makes the requests of the latent cache keep what they decode
for as long as memory allows, and pairs that share an image are best asked for one after the other.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rpo.data.cache import LatentRequest
from rpo.data.preference import SIDES, PreferencePair
from rpo.data.readthrough import Memory, ReadThrough
from rpo.data.store import TensorStore
from rpo.errors import InputError

_CHUNK = 16


@dataclass(frozen=True)
class DifferenceRequest:
    """The two images of a pair as they are to be compared. Equal requests have equal differences."""

    chosen: LatentRequest
    rejected: LatentRequest

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.chosen.name} against {self.rejected.name}"


def grid_difference(
    first: Float[Tensor, "3 height width"], second: Float[Tensor, "3 height width"], *, grid: tuple[int, int]
) -> Float[Tensor, "h w"]:
    """Absolute difference of two images in [0, 1], mean over channels and over the area of each cell of a grid."""
    difference = (first - second).abs().mean(dim=0)
    return F.interpolate(difference[None, None], size=grid, mode="area")[0, 0]


@final
class PairDifferences:
    """Differences of pairs, each made once.

    Example:
        >>> differences = PairDifferences("cache", grid=(64, 64))
        >>> differences.of([differences.request(pair, *latent_requests(pair, transform, draw))])
    """

    def __init__(self, folder: str | Path, *, grid: tuple[int, int], memory: Memory | None = None) -> None:
        """Open or create the cache.

        Args:
            folder: Where `differences.sqlite` lies; it may serve several models and runs.
            memory: Decoded images and differences at hand beside the file; None for a memory of its own.
        """
        self._grid = grid
        self._memory = memory or Memory()
        self._cache = ReadThrough[DifferenceRequest](
            TensorStore(Path(folder) / "differences.sqlite"),
            key_of=lambda request: hashlib.sha256(f"{grid}/{request!r}".encode()).digest(),
            name_of=lambda request: request.name,
            encode=self._encode,
            dtype=torch.float32,
            chunk_size=_CHUNK,
            memory=self._memory,
        )

    def request(self, pair: PreferencePair, chosen: LatentRequest, rejected: LatentRequest) -> DifferenceRequest:
        """What to ask for one use of a pair.

        Args:
            chosen: Its chosen image as the latents see it, from `remembering`.
        """
        sizes = [pair.facts(side).size for side in SIDES]
        if sizes[0] != sizes[1]:
            raise InputError(
                f"{pair.name}: the chosen image is {sizes[0][0]}x{sizes[0][1]}, the rejected one "
                f"{sizes[1][0]}x{sizes[1][1]}; expected one size, since region weighting compares them place by "
                "place; remove the record, or switch region.is_on off"
            )
        return DifferenceRequest(chosen, rejected)

    def remembering(self, request: LatentRequest) -> LatentRequest:
        """The same request, keeping its pixels at hand when they are read."""
        return replace(request, load=partial(self._load, request))

    def of(self, requests: Sequence[DifferenceRequest]) -> Float[Tensor, "batch h w"]:
        """The difference of each pair in order, float32 on the CPU; what is missing is made and kept."""
        return self._cache.fetch(requests)

    def prefetch(self, requests: Sequence[DifferenceRequest]) -> None:
        """Make what is missing of many requests; when interrupted, the next call goes on where this one ended."""
        self._cache.prefetch(requests, None)

    def close(self) -> None:
        """Let go of the file."""
        self._cache.store.close()

    def _encode(self, requests: Sequence[DifferenceRequest]) -> Tensor:
        return torch.stack(
            [
                grid_difference(request.chosen.pixels(), request.rejected.pixels(), grid=self._grid)
                for request in requests
            ]
        )

    def _load(self, request: LatentRequest) -> Float[Tensor, "3 height width"]:
        if (small := self._memory.get(request)) is not None:
            return small.float() / 255
        pixels = request.load()
        self._memory.keep(request, (pixels * 255).round().to(torch.uint8))  # exactly what was read: bytes by 255
        return pixels
