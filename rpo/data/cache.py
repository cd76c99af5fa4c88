"""Latents and prompt embeddings, encoded once and kept on disk.

An entry's key covers everything that determines it: the model's fingerprint, the storage type, the content of the image
or the prompt, and for an image the scaling, the cut and the mirroring. A changed input is therefore another key, and a
stale hit cannot happen. Entries are made when they are first asked for: a mirrored image that is never drawn is never
encoded, so the cache never costs more than encoding at every step would.

Nor does an entry depend on its company. The last bits of a convolution or a matrix product change with the batch size
(1e-6 in the latents of a small autoencoder), so that by default one input is encoded at a time: with the cache warm,
cold or half filled by another run, training sees equal bits.

What is kept of an image is the mean and the std of the encoder's posterior, from which any draw of latents follows.
For SD 1.5 at 512 px they take 128 KiB an image and mirroring in float32, 64 KiB in float16; a prompt takes 231 KiB in
float32. Only damaged entries are ever removed: delete the folder to free the space.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from rpo.data.preference import SIDES, PreferencePair
from rpo.data.readthrough import Memory, Progress, ReadThrough
from rpo.data.store import TensorStore
from rpo.data.transform import PairTransform, TransformDraw, Window
from rpo.errors import InputError
from rpo.types import Embedding, Images, Latents

_CHUNK = 16


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

    def pixels(self) -> Float[Tensor, "3 height width"]:
        """The pixels to encode."""
        return self.load()


def latent_requests(
    pair: PreferencePair, transform: PairTransform, draw: TransformDraw
) -> tuple[LatentRequest, LatentRequest]:
    """What to ask the cache for one use of a pair: the chosen image, then the rejected one."""
    chosen, rejected = (pair.facts(side) for side in SIDES)
    windows = transform.windows(chosen.size, rejected.size, draw)
    first, second = (
        LatentRequest(
            digest=facts.digest,
            transform_key=transform.key,
            window=window,
            load=partial(transform.load, pair, side, window),
            name=f"{pair.name} ({side})",
        )
        for side, facts, window in zip(SIDES, (chosen, rejected), windows, strict=True)
    )
    return first, second


class LatentCache:
    """Posterior moments of images, each encoded once.

    Example:
        >>> cache = LatentCache("cache", encode=model.encode_moments, model_key=model.vae_fingerprint())
        >>> mean, std = cache.moments(latent_requests(pair, transform, draw))
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        encode: Callable[[Images], tuple[Latents, Latents]],
        model_key: str,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 1,
        memory: Memory | None = None,
    ) -> None:
        """Open or create the cache.

        Args:
            folder: Where `latents.sqlite` lies; it may serve several models and runs.
            encode: Images in [0, 1] on the CPU to the posterior's mean and std.
            model_key: Fingerprint of all that determines `encode`: weights, scaling, the type it computes in.
            dtype: What is stored; float16 halves the file and rounds the moments, for all uses alike.
            batch_size: Images encoded in one call; more than 1 is up to twice as fast on small images, but makes the
                last bits of an entry depend on what was encoded with it.
            memory: Entries at hand beside the file; None for a memory of its own.
        """
        self._encode_images, self._batch_size = encode, batch_size
        self._cache = ReadThrough[LatentRequest](
            TensorStore(Path(folder) / "latents.sqlite"),
            key_of=lambda request: _key("latents", model_key, dtype, repr(request)),
            name_of=lambda request: request.name,
            encode=self._encode,
            read=_pixels,
            dtype=dtype,
            chunk_size=_chunk_size(batch_size),
            memory=memory or Memory(),
        )

    @property
    def encoded(self) -> int:
        """Images encoded since this cache was opened."""
        return self._cache.encoded

    @property
    def hits(self) -> int:
        """Requests answered without encoding since this cache was opened."""
        return self._cache.hits

    def moments(self, requests: Sequence[LatentRequest]) -> tuple[Latents, Latents]:
        """Mean and std for each request in order, float32 on the CPU; what is missing is encoded and kept."""
        mean, std = self._cache.fetch(requests).float().unbind(dim=1)
        return mean, std

    def prefetch(self, requests: Sequence[LatentRequest], *, progress: Progress | None = None) -> None:
        """Encode what is missing of many requests; when interrupted, the next call goes on where this one ended.

        Args:
            progress: Called now and then with (entries present, entries in all).
        """
        self._cache.prefetch(requests, progress)

    def close(self) -> None:
        """Let go of the file."""
        self._cache.store.close()

    def _encode(self, images: Images) -> Tensor:
        moments = [torch.stack(self._encode_images(batch), dim=1).cpu() for batch in images.split(self._batch_size)]
        return torch.cat(moments)


class EmbeddingCache:
    """Embeddings of prompts, each encoded once.

    Example:
        >>> cache = EmbeddingCache("cache", encode=embed, model_key=model.text_fingerprint())
        >>> embeds = cache.embed(["a red circle", ""])
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        encode: Callable[[list[str]], Embedding],
        model_key: str,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 1,
        memory: Memory | None = None,
    ) -> None:
        """Open or create the cache.

        Args:
            folder: Where `embeddings.sqlite` lies; it may serve several models and runs.
            encode: Prompts to their embeddings. An entry is one row of numbers: all tensors of a prompt, one after the
                other; their names and shapes are kept once.
            model_key: Fingerprint of all that determines `encode`: tokenizer, weights, the type it computes in.
            batch_size: Prompts encoded in one call; more than 1 is faster, but makes the last bits of an entry depend
                on what was encoded with it.
            memory: Entries at hand beside the file; None for a memory of its own.
        """
        self._encode_prompts, self._batch_size = encode, batch_size
        self._shapes: dict[str, torch.Size] = {}
        self._shapes_key = _key("shapes", model_key, dtype, "")
        self._cache = ReadThrough[str](
            TensorStore(Path(folder) / "embeddings.sqlite"),
            key_of=lambda prompt: _key("embeddings", model_key, dtype, prompt),
            name_of=repr,
            encode=self._encode,
            dtype=dtype,
            chunk_size=_chunk_size(batch_size),
            memory=memory or Memory(),
        )

    @property
    def encoded(self) -> int:
        """Prompts encoded since this cache was opened."""
        return self._cache.encoded

    @property
    def hits(self) -> int:
        """Requests answered without encoding since this cache was opened."""
        return self._cache.hits

    def embed(self, prompts: Sequence[str]) -> Embedding:
        """The embedding of each prompt in order, on the CPU; what is missing is encoded and kept."""
        rows = self._cache.fetch(prompts)
        self._shapes = shapes = self._shapes or _read_shapes(self._cache.store, self._shapes_key)
        parts = rows.split([shape.numel() for shape in shapes.values()], dim=1)
        return {name: part.view(-1, *shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def prefetch(self, prompts: Sequence[str], *, progress: Progress | None = None) -> None:
        """Encode what is missing of many prompts; when interrupted, the next call goes on where this one ended.

        Args:
            progress: Called now and then with (entries present, entries in all).
        """
        self._cache.prefetch(prompts, progress)

    def close(self) -> None:
        """Let go of the file."""
        self._cache.store.close()

    def _encode(self, prompts: Sequence[str]) -> Tensor:
        starts = range(0, len(prompts), self._batch_size)
        batches = [self._encode_prompts(list(prompts[start : start + self._batch_size])) for start in starts]
        if not self._shapes:
            self._shapes = {name: one.shape[1:] for name, one in batches[0].items()}
            self._cache.store.save({self._shapes_key: _written_shapes(self._shapes)})
        return torch.cat([torch.cat([one[name].flatten(1).cpu() for name in self._shapes], dim=1) for one in batches])


def _written_shapes(shapes: Mapping[str, torch.Size]) -> Tensor:
    """Names and shapes as the store can keep them: numbers that stand for the characters of JSON."""
    return torch.tensor(list(json.dumps(shapes).encode()), dtype=torch.float64)


def _read_shapes(store: TensorStore, key: bytes) -> dict[str, torch.Size]:
    text = bytes(store.load([key])[key].to(torch.uint8).tolist())
    return {name: torch.Size(shape) for name, shape in json.loads(text).items()}


def _pixels(requests: Sequence[LatentRequest]) -> Images:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding releases the interpreter lock
        return torch.stack(list(pool.map(LatentRequest.pixels, requests)))


def _chunk_size(batch_size: int) -> int:
    """Entries made between two writes: whole batches, enough of them to keep several decoding threads busy."""
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; expected a positive number; 1 gives reproducible entries")
    return batch_size * max(1, _CHUNK // batch_size)


def _key(kind: str, model_key: str, dtype: torch.dtype, identity: str) -> bytes:
    """One hash of everything that determines an entry; lengths keep neighbouring parts from running together."""
    parts = (kind, model_key, str(dtype), identity)
    return hashlib.sha256("".join(f"{len(part)}:{part}" for part in parts).encode("utf-8")).digest()
