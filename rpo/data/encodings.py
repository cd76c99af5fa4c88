"""What training reads of a pair: latents of its images, embeddings of prompts, where its images differ; each made once.

A key covers everything that determines an entry: the model's fingerprint, the storage type, the content of the image or
the prompt, and for an image the scaling, the cut and the mirroring. A mirrored image that is never drawn is never
encoded.

What is kept of an image is the mean and the std of the encoder's posterior, from which any draw of latents follows.
For SD 1.5 at 512 px they take 128 KiB an image and mirroring in float32, 64 KiB in float16; a prompt takes 231 KiB in
float32. Only damaged entries are ever removed: delete the folder to free the space.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rpo.data.cache import Memory, TensorCache
from rpo.data.preference import SIDES, PreferencePair
from rpo.data.transform import PairTransform, TransformDraw, Window
from rpo.errors import InputError
from rpo.types import Embedding, Images, Latents


@dataclass(frozen=True)
class LatentRequest:
    """One image as it is to be encoded. Equal requests have equal pixels."""

    digest: str
    """Content hash of the encoded image."""
    transform_key: str
    """How it is scaled."""
    window: Window
    """Which part of it, and whether mirrored."""
    load: Callable[[], Float[Tensor, "3 height width"]] = field(compare=False, repr=False)
    """Reads the pixels; called only when they must be encoded."""
    name: str = field(compare=False, repr=False)
    """What messages call it."""
    told: tuple[int, ...] = field(compare=False, repr=False)
    """Sizes of image, window and canvas; see `PairTransform.told`."""


def latent_requests(
    pair: PreferencePair, transform: PairTransform, draw: TransformDraw
) -> tuple[LatentRequest, LatentRequest]:
    """What to ask the cache for one use of a pair: the chosen image, then the rejected one."""
    facts = [pair.facts(side) for side in SIDES]
    windows = transform.windows(facts[0].size, facts[1].size, draw)
    first, second = (
        LatentRequest(
            one.digest,
            transform.key,
            window,
            load=partial(transform.load, pair, side, window),
            name=f"{pair.name} ({side})",
            told=transform.told(one.size, window),
        )
        for side, one, window in zip(SIDES, facts, windows, strict=True)
    )
    return first, second


def original_request(pair: PreferencePair, transform: PairTransform, draw: TransformDraw) -> LatentRequest:
    """What to ask for the image that a pair's two are edits of: cut as they are."""
    facts = pair.facts("original")
    _, window = transform.windows(pair.facts("chosen").size, facts.size, draw)
    return LatentRequest(
        facts.digest,
        transform.key,
        window,
        load=partial(transform.load, pair, "original", window),
        name=f"{pair.name} (original)",
        told=transform.told(facts.size, window),
    )


@dataclass(frozen=True)
class InstructionRequest:
    """A prompt that is encoded together with the image that it edits."""

    prompt: str
    original: LatentRequest


TextRequest = str | InstructionRequest
"""What is asked of the text encoders."""


@final
class LatentCache(TensorCache[LatentRequest]):
    """Posterior moments of images.

    Example:
        >>> cache = LatentCache("cache", encode=model.encode_moments, model_key=model.fingerprint("vae"))
        >>> mean, std = cache.moments(latent_requests(pair, transform, draw))
    """

    def __init__(
        self, folder: str | Path, *, encode: Callable[[Images], tuple[Latents, Latents]], model_key: str, **options: Any
    ) -> None:
        """Open or create `latents.sqlite` in a folder.

        Args:
            encode: Images in [0, 1] on the CPU to the posterior's mean and std.
            model_key: Fingerprint of all that determines `encode`: weights, scaling, the type it computes in.
            options: Those of every `TensorCache`.
        """
        super().__init__(Path(folder) / "latents.sqlite", **options)
        self._encode_images, self._model_key = encode, model_key

    def moments(self, requests: Sequence[LatentRequest]) -> tuple[Latents, Latents]:
        """Mean and std for each request in order, float32 on the CPU; what is missing is encoded and kept."""
        mean, std = self.fetch(requests).float().unbind(dim=1)
        return mean, std

    def _key_of(self, request: LatentRequest) -> bytes:
        return _key("latents", self._model_key, self._dtype, repr(request))

    def _name_of(self, request: LatentRequest) -> str:
        return request.name

    def _read(self, requests: Sequence[LatentRequest]) -> Images:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding releases the interpreter lock
            return torch.stack(list(pool.map(lambda request: request.load(), requests)))

    def _encode(self, read: Images) -> Tensor:
        return torch.cat([torch.stack(self._encode_images(some), dim=1).cpu() for some in read.split(self._batch_size)])


@final
class EmbeddingCache(TensorCache[TextRequest]):
    """Embeddings of prompts; an entry is all tensors of a prompt in a row, whose names and shapes are kept once.

    Example:
        >>> cache = EmbeddingCache("cache", encode=embed, model_key=model.fingerprint("text"))
        >>> embeds = cache.embed(["a red circle", ""])
    """

    def __init__(self, folder: str | Path, *, encode: Callable[..., Embedding], model_key: str, **options: Any) -> None:
        """Open or create `embeddings.sqlite` in a folder.

        Args:
            encode: Prompts, and the image of each where one is asked with them, to their embeddings.
            model_key: Fingerprint of all that determines `encode`: tokenizer, weights, the type it computes in.
            options: Those of every `TensorCache`.
        """
        super().__init__(Path(folder) / "embeddings.sqlite", **options)
        self._encode_prompts, self._model_key = encode, model_key
        self._shapes: dict[str, torch.Size] = {}

    def embed(self, prompts: Sequence[TextRequest]) -> Embedding:
        """The embedding of each prompt in order, on the CPU; what is missing is encoded and kept."""
        rows = self.fetch(prompts)
        if not self._shapes:
            written = self._store.load([self._shapes_key])[self._shapes_key].to(torch.uint8)
            self._shapes = {name: torch.Size(shape) for name, shape in json.loads(bytes(written.tolist())).items()}
        parts = rows.split([shape.numel() for shape in self._shapes.values()], dim=1)
        return {name: part.view(-1, *shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def _key_of(self, request: TextRequest) -> bytes:
        return _key("embeddings", self._model_key, self._dtype, request if isinstance(request, str) else repr(request))

    def _name_of(self, request: TextRequest) -> str:
        return repr(request) if isinstance(request, str) else f"{request.prompt!r} for {request.original.name}"

    def _encode(self, read: Sequence[TextRequest]) -> Tensor:
        starts = range(0, len(read), self._batch_size)
        batches = [self._embedded(read[start : start + self._batch_size]) for start in starts]
        if not self._shapes:
            self._shapes = {name: one.shape[1:] for name, one in batches[0].items()}
            written = list(json.dumps(self._shapes).encode())  # a store keeps numbers: the characters of JSON
            self._store.save({self._shapes_key: torch.tensor(written, dtype=torch.float64)})
        return torch.cat([torch.cat([one[name].flatten(1).cpu() for name in self._shapes], dim=1) for one in batches])

    def _embedded(self, some: Sequence[TextRequest]) -> Embedding:
        seen = [one for one in some if isinstance(one, InstructionRequest)]
        if not seen:
            return self._encode_prompts(some)
        return self._encode_prompts([one.prompt for one in seen], torch.stack([one.original.load() for one in seen]))

    @property
    def _shapes_key(self) -> bytes:
        return _key("shapes", self._model_key, self._dtype, "")


def _key(kind: str, model_key: str, dtype: torch.dtype, identity: str) -> bytes:
    """One hash of everything that determines an entry; lengths keep neighbouring parts from running together."""
    parts = (kind, model_key, str(dtype), identity)
    return hashlib.sha256("".join(f"{len(part)}:{part}" for part in parts).encode("utf-8")).digest()


@dataclass(frozen=True)
class DifferenceRequest:
    """The two images of a pair as they are to be compared. Equal requests have equal differences."""

    chosen: LatentRequest
    rejected: LatentRequest


def grid_difference(
    first: Float[Tensor, "3 height width"], second: Float[Tensor, "3 height width"], *, cell: int
) -> Float[Tensor, "h w"]:
    """Absolute difference of two images in [0, 1], mean over channels and over the area of each cell of a grid."""
    difference = (first - second).abs().mean(dim=0)
    grid = [side // cell for side in difference.shape]
    return F.interpolate(difference[None, None], size=grid, mode="area")[0, 0]


@final
class PairDifferences(TensorCache[DifferenceRequest]):
    """Where the two images of a pair differ, on the grid of their latents.

    What is kept is the difference, not a mask of it, so that the settings of a mask can change without reading an image
    again. No image is read twice for it: `remembering` makes the requests of the latent cache keep what they decode for
    as long as memory allows, and pairs that share an image are best asked for one after the other.

    Example:
        >>> differences = PairDifferences("cache", cell=8)
        >>> differences.of([differences.request(pair, *latent_requests(pair, transform, draw))])
    """

    def __init__(self, folder: str | Path, *, cell: int, memory: Memory | None = None) -> None:
        """Open or create `differences.sqlite` in a folder; decoded images lie in the memory, too.

        Args:
            cell: Pixels along a side of one cell of the latents.
        """
        super().__init__(Path(folder) / "differences.sqlite", memory=memory)
        self._cell = cell

    def request(self, pair: PreferencePair, chosen: LatentRequest, rejected: LatentRequest) -> DifferenceRequest:
        """What to ask for one use of a pair, whose images are requested by `remembering`."""
        sizes = [pair.facts(side).size for side in SIDES]
        if sizes[0] != sizes[1]:
            raise InputError(
                f"{pair.name}: the chosen image is {sizes[0][0]}x{sizes[0][1]}, the rejected one "
                f"{sizes[1][0]}x{sizes[1][1]}; expected one size, since region weighting compares them place by "
                "place; remove the record, or give region=null"
            )
        return DifferenceRequest(chosen, rejected)

    def remembering(self, request: LatentRequest) -> LatentRequest:
        """The same request, keeping its pixels at hand when they are read."""
        return replace(request, load=partial(self._load, request))

    def of(self, requests: Sequence[DifferenceRequest]) -> Float[Tensor, "batch h w"]:
        """The difference of each pair in order, float32 on the CPU; what is missing is made and kept."""
        return self.fetch(requests)

    def _key_of(self, request: DifferenceRequest) -> bytes:
        return hashlib.sha256(f"{self._cell}/{request!r}".encode()).digest()

    def _name_of(self, request: DifferenceRequest) -> str:
        return f"{request.chosen.name} against {request.rejected.name}"

    def _encode(self, read: Sequence[DifferenceRequest]) -> Tensor:
        return torch.stack([grid_difference(one.chosen.load(), one.rejected.load(), cell=self._cell) for one in read])

    def _load(self, request: LatentRequest) -> Float[Tensor, "3 height width"]:
        if (small := self._memory.get(request)) is not None:
            return small.float() / 255
        pixels = request.load()
        self._memory.keep(request, (pixels * 255).round().to(torch.uint8))  # exactly what was read: bytes by 255
        return pixels
