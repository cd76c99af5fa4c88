"""From a preference set to the micro-batches of a preference trainer, each a function of its position in the run alone.

Position p of the run is one *visit*: a pair, and a draw for it (mirroring, time, noise, whether the caption is
dropped). The two sides of a pair share all of these. The micro-batches of one moment, on all processes, are of one
bucket of sizes. With `draws_per_pair` the draws repeat from then on, so that what
depends on them alone, the reference's errors, can be computed once and used again in later epochs and in other runs.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from rpo.data.buckets import Buckets
from rpo.data.cache import Memory
from rpo.data.encodings import (
    DifferenceRequest,
    EmbeddingCache,
    LatentCache,
    LatentRequest,
    PairDifferences,
    TextRequest,
    latent_requests,
    original_request,
)
from rpo.data.order import GroupedOrder
from rpo.data.preference import PairSet, require_two_images
from rpo.data.transform import PairTransform, TransformDraw, caption_dropped
from rpo.devices import uploaded
from rpo.errors import InputError
from rpo.models.checkpoint import Checkpoint
from rpo.randomness import keyed_generator
from rpo.trainers.dpo_config import DPOConfig
from rpo.trainers.pairs.conditions import PairConditions
from rpo.types import Conditioning

MIDWAY = -1
"""Number of the draw that no visit has: the pair as it is looked at before training."""

COUPLES_AT_ONCE = 16


@dataclass(frozen=True)
class UpdateShare:
    """Which part of every update this process computes."""

    micro_batch: int
    """Pairs per micro-batch on this process."""
    accumulate: int
    """Micro-batches per update."""
    process: int = 0
    processes: int = 1

    @property
    def at_once(self) -> int:
        """Pairs in the micro-batches of all processes."""
        return self.micro_batch * self.processes


@dataclass(frozen=True)
class PairBatch:
    """A micro-batch of preference pairs, on the training device."""

    x_0: Float[Tensor, "twice_batch c h w"]
    """Clean latents: all chosen sides, then all rejected ones."""
    eps: Float[Tensor, "batch c h w"]
    """The noise that both sides of a pair share."""
    timestep: Int[Tensor, " batch"] | Float[Tensor, " batch"]
    """The time that both sides of a pair share."""
    conditioning: Conditioning
    """One row per pair."""
    sizes: Float[Tensor, "twice_batch 6"]
    """What `Conditioning.told` tells of each image."""
    names: tuple[str, ...]
    """What a person calls the records."""
    draws: tuple[str, ...]
    """What identifies each visit: equal strings are equal latents, noise, time and caption."""
    pairs: tuple[int, ...] = ()
    """Which pair of the set each is."""
    difference: Float[Tensor, "batch h w"] | None = None
    """How far the two images of each pair lie apart at each place, if that is asked for."""


def share_of(pairs_per_update: int, micro_batch: int, process: int, processes: int) -> UpdateShare:
    """This process's part of every update."""
    at_once = micro_batch * processes
    if pairs_per_update % at_once:
        per_process = pairs_per_update / processes
        fitting = [n for n in range(1, int(per_process) + 1) if per_process % n == 0]
        raise InputError(
            f"pairs_per_update={pairs_per_update} is not a multiple of learning.micro_batch={micro_batch} times "
            f"{processes} process(es); use a micro_batch of "
            f"{', '.join(map(str, fitting)) or f'1 and a multiple of {processes} pairs'}"
        )
    return UpdateShare(micro_batch, pairs_per_update // at_once, process, processes)


def pair_batches(
    model: Checkpoint, pairs: PairSet, config: DPOConfig, share: UpdateShare, buckets: Buckets, *, folder: Path
) -> "PairBatches":
    """The stream that settings describe, with its caches in `folder`."""
    memory = Memory()
    return PairBatches(
        model,
        pairs,
        buckets=buckets,
        transforms=[PairTransform(canvas, crop=config.crop, flip=config.flip) for canvas in buckets.canvases],
        share=share,
        latents=LatentCache(
            folder,
            encode=model.encode_moments,
            model_key=model.fingerprint("vae"),
            batch_size=config.encode_batch,
            memory=memory,
        ),
        embeddings=EmbeddingCache(
            folder,
            encode=model.embed,
            model_key=model.fingerprint("text"),
            dtype=model.text_dtype,
            batch_size=config.encode_batch,
            memory=memory,
        ),
        caption_dropout=config.caption_dropout,
        draws_per_pair=config.draws_per_pair,
        seed=config.seed,
        differences=None if config.region is None else PairDifferences(folder, cell=model.cell, memory=memory),
    )


@final
class PairBatches:
    """The endless stream of micro-batches of one run; calling it with an update gives the stream from there."""

    def __init__(
        self,
        model: Checkpoint,
        pairs: PairSet,
        *,
        buckets: Buckets,
        transforms: Sequence[PairTransform],
        share: UpdateShare,
        latents: LatentCache,
        embeddings: EmbeddingCache,
        caption_dropout: float,
        draws_per_pair: int | None,
        seed: int,
        differences: PairDifferences | None = None,
    ):
        """Wire the stream.

        Args:
            model: Encodes what the caches do not have, and says where batches go.
            transforms: One for each bucket.
            draws_per_pair: How many draws a pair has before they repeat; None for a new one at each visit.
            differences: Of the two images of a pair, if batches are to say where they differ.
        """
        self.model = model
        self.pairs = pairs
        self.buckets = buckets
        self.transforms = transforms
        self.share = share
        self.latents = latents
        self.embeddings = embeddings
        self.conditions = PairConditions(model, embeddings)
        self.caption_dropout = caption_dropout
        self.draws_per_pair = draws_per_pair
        self.seed = seed
        self.differences = differences
        self._bucket_of = buckets.of_pair
        self._order = GroupedOrder(buckets.counts, share.at_once, seed)
        self._two_images: set[int] = set()

    def __call__(self, first_update: int) -> Iterator[PairBatch]:
        """The micro-batches of this process from update `first_update` (0 is the first) on, without end."""
        share = self.share
        position = first_update * share.accumulate * share.at_once + share.process * share.micro_batch
        while True:
            yield self.at(range(position, position + share.micro_batch))
            position += share.at_once

    def at(self, positions: Sequence[int]) -> PairBatch:
        """The micro-batch of the visits at `positions`."""
        return self._batch([self._visit(position) for position in positions])

    def midway(self, pairs: Sequence[int]) -> PairBatch:
        """One draw of each of `pairs` at the middle of the times, with its caption: apart from the run's own draws."""
        return self._batch([(pair, MIDWAY) for pair in pairs])

    def by_size(self, pairs: Iterable[int]) -> list[list[int]]:
        """The pairs of each bucket that has some, in order."""
        sized: list[list[int]] = [[] for _ in self.transforms]
        for pair in pairs:
            sized[self._bucket_of[pair]].append(pair)
        return [some for some in sized if some]

    def _batch(self, visits: Sequence[tuple[int, int]]) -> PairBatch:
        requests = [self._requests(pair, draw) for pair, draw in visits]
        chosen, rejected = zip(*requests, strict=True)
        originals = [one for visit in visits for one in self._originals(*visit)]
        mean, std = self.latents.moments([*chosen, *rejected, *originals])
        (mean, shown), std = mean.tensor_split([2 * len(visits)]), std[: 2 * len(visits)]
        self._refuse_one_image([pair for pair, _ in visits], mean)
        randomness = [self._noise(pair, draw, mean.shape[1:]) for pair, draw in visits]
        timestep, eps, chosen_noise, rejected_noise = map(torch.stack, zip(*randomness, strict=True))
        device = self.model.device
        told = torch.tensor([one.told for one in (*chosen, *rejected)], dtype=torch.float32, device="cpu")
        return PairBatch(
            uploaded(mean + std * torch.cat([chosen_noise, rejected_noise]), device),
            uploaded(eps, device),
            uploaded(timestep, device),
            self.conditions.of([self._caption(pair, draw) for pair, draw in visits], originals, shown),
            uploaded(told, device),
            tuple(self.pairs[pair].name for pair, _ in visits),
            tuple(self._identity(pair, draw) for pair, draw in visits),
            tuple(pair for pair, _ in visits),
            self._difference(visits),
        )

    def _originals(self, pair: int, draw: int) -> list[LatentRequest]:
        """The image that a pair's two are edits of; none where they are no edits."""
        one = self.pairs[pair]
        return [] if one.original is None else [original_request(one, *self._how(pair, draw))]

    def fill_caches(self, updates: int, *, progress: bool) -> None:
        """Encode what a run of `updates` will visit and the caches lack; goes on where a killed call stopped."""
        texts, encoded, draws = dict[TextRequest, None](), self.latents.encoded, dict[int, int]()
        requests: list[dict[LatentRequest, None]] = [{} for _ in self.transforms]
        couples: list[dict[DifferenceRequest, int]] = [{} for _ in self.transforms]
        for pair, draw in self._visits(updates):
            if pair % self.share.processes != self.share.process:  # by pair: its draws share their latents
                continue
            both, originals, bucket = self._requests(pair, draw), self._originals(pair, draw), self._bucket_of[pair]
            requests[bucket] |= dict.fromkeys((*both, *originals))
            if self.differences is not None:
                couples[bucket][self.differences.request(self.pairs[pair], *both)] = pair
            for caption in (self.pairs[pair].prompt, ""):
                texts |= dict.fromkeys(self.conditions.requests([caption], originals))
            draws[pair] = draw
        with tqdm(total=sum(map(len, requests)), desc="encoding images", unit="image", disable=not progress) as bar:
            for some, pairs in zip(requests, couples, strict=True):  # what is encoded together is of one size
                self._fill(list(some), sorted(pairs, key=pairs.__getitem__), bar)
        self.conditions.prefetch(list(texts))
        if self.latents.encoded > encoded:
            self._compare(draws)

    def _visits(self, updates: int) -> Iterable[tuple[int, int]]:
        """The visits of a run; of pairs whose draws all have the same pixels the first ones."""
        visits = map(self._visit, range(updates * self.share.accumulate * self.share.at_once))
        if any(one.flip or one.crop != "center" for one in self.transforms):
            return visits
        first: dict[int, int] = {}
        for pair, draw in visits:
            first.setdefault(pair, draw)
            if len(first) == len(self.pairs):
                break
        return first.items()

    def _fill(self, requests: Sequence[LatentRequest], couples: Sequence[DifferenceRequest], bar: tqdm) -> None:
        """Encode images of one size; those of neighbouring pairs together, so that an image is read once for all."""
        start = bar.n
        if self.differences is not None:
            for first in range(0, len(couples), COUPLES_AT_ONCE):
                some = couples[first : first + COUPLES_AT_ONCE]
                self.latents.prefetch([request for couple in some for request in (couple.chosen, couple.rejected)])
                self.differences.prefetch(some)
                bar.update(min(2 * COUPLES_AT_ONCE, start + len(requests) - bar.n))
        self.latents.prefetch(requests, progress=lambda done, _: bar.update(start + done - bar.n))

    def _compare(self, draws: Mapping[int, int]) -> None:
        """Refuse pairs of one image now rather than when they are visited; their latents are there already."""
        for pairs in self.by_size(draws):
            for start in range(0, len(pairs), COUPLES_AT_ONCE):
                some = pairs[start : start + COUPLES_AT_ONCE]
                chosen, rejected = zip(*(self._requests(pair, draws[pair]) for pair in some), strict=True)
                self._refuse_one_image(some, self.latents.moments([*chosen, *rejected])[0])

    def _refuse_one_image(self, pairs: Sequence[int], mean: Tensor) -> None:
        """Refuse a pair of one image; only one whose two sides are encoded alike, as two crops may be, is decoded."""
        for pair, chosen, rejected in zip(pairs, *mean.chunk(2), strict=True):
            if pair not in self._two_images and torch.equal(chosen, rejected):
                require_two_images(self.pairs[pair])
                self._two_images.add(pair)

    def _visit(self, position: int) -> tuple[int, int]:
        bucket, place, epoch = self._order.visit(position)
        draw = epoch if self.draws_per_pair is None else epoch % self.draws_per_pair
        return self.buckets.members[bucket][place], draw

    def _how(self, pair: int, draw: int) -> tuple[PairTransform, TransformDraw]:
        transform = self.transforms[self._bucket_of[pair]]
        return transform, transform.draw(seed=self.seed, pair_index=pair, draw_index=max(draw, 0))

    def _requests(self, pair: int, draw: int) -> tuple[LatentRequest, LatentRequest]:
        transform, how = self._how(pair, draw)
        chosen, rejected = latent_requests(self.pairs[pair], transform, how)
        if self.differences is None:
            return chosen, rejected
        return self.differences.remembering(chosen), self.differences.remembering(rejected)

    def _difference(self, visits: Sequence[tuple[int, int]]) -> Tensor | None:
        if self.differences is None:
            return None
        asked = [self.differences.request(self.pairs[pair], *self._requests(pair, draw)) for pair, draw in visits]
        return uploaded(self.differences.of(asked), self.model.device)

    def _noise(self, pair: int, draw: int, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = keyed_generator("noise", self.seed, pair, draw)
        timestep = self.model.schedule.draw(generator)
        if draw == MIDWAY:
            timestep = torch.full_like(timestep, self.model.num_train_timesteps // 2)
        eps, chosen_noise, rejected_noise = torch.randn(
            3, *shape, generator=generator, dtype=torch.float32, device="cpu"
        )
        return timestep, eps, chosen_noise, rejected_noise

    def _caption(self, pair: int, draw: int) -> str:
        if draw == MIDWAY:
            return self.pairs[pair].prompt
        is_dropped = caption_dropped(seed=self.seed, pair_index=pair, draw_index=draw, rate=self.caption_dropout)
        return "" if is_dropped else self.pairs[pair].prompt

    def _identity(self, pair: int, draw: int) -> str:
        images = *self._requests(pair, draw), *self._originals(pair, draw)
        return repr((self.seed, pair, draw, self._caption(pair, draw), *images, [one.told for one in images]))
