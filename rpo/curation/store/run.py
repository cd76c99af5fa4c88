"""A run as a whole: what made each stage, how many records there are, and the shards that are sealed.

    manifest.json        what made each stage's records, and how the plan is cut
    run.yaml             the settings of the last call
    shards/…             what was found out, see `rpo.curation.store.shard`
    answers/…            what models answered, see `rpo.curation.vlm.answers`

Process i of n does the shards whose number leaves the remainder i when divided by n; so processes need not talk to each
other, and may be on any machines that see the same place.

A run never mixes what was made in two ways. A stage of a shard counts if it was made as the manifest says, and so was
every stage before it; the others are done anew.
"""

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar, final

from rpo.curation.store.address import Store
from rpo.curation.store.mark import STAGES, Identity, ShardMark, StageName, Tally, mark_name, mark_of, read_marks
from rpo.curation.store.shard import ROWS_AT_ONCE, Shard, opened, read, read_images
from rpo.errors import InputError
from rpo.from_environment import as_written

if TYPE_CHECKING:
    import pyarrow.parquet as pq

MANIFEST, SETTINGS = "manifest.json", "run.yaml"

_LAYOUT = 2  # of the place; written down, so that another layout is refused and not misread


@dataclass(frozen=True)
class Share:
    """Part `index` of `count`.

    Example:
        >>> Share(1, 4).owns(5)
        True
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        """Refuse a part that there is not."""
        if not 0 <= self.index < self.count:
            raise InputError(
                f"share {self.index} of {self.count}; expected 0 to {max(self.count - 1, 0)} of at least 1; with 4 "
                "processes the shares are 0/4, 1/4, 2/4 and 3/4"
            )

    def owns(self, shard: int) -> bool:
        """Whether a shard is this share's."""
        return shard % self.count == self.index


def share_of(shards: str, environment: Mapping[str, str]) -> Share:
    """The share that a configuration asks for, or else the one that torchrun or accelerate gave this process.

    Args:
        shards: "0/4" for the first of four; empty to look into the environment.
    """
    if not shards:
        return Share(int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1")))
    found = re.fullmatch(r"(\d+)/(\d+)", shards)
    if not found:
        raise InputError(f"shards is {shards!r}; expected INDEX/COUNT; write shards=0/4 for the first of four")
    return Share(int(found[1]), int(found[2]))


@dataclass(frozen=True)
class Manifest:
    """What made the records of each stage, and how the plan is cut."""

    stages: Mapping[StageName, tuple[Identity, str]]
    """Of each stage the identity as it was written, and the sha256 of its values."""
    records: int = 0
    shards: int = 0
    shard: int = 0
    """Records of a shard, about: what belongs together stays so."""

    @property
    def made_by(self) -> dict[StageName, str]:
        """The sha256 of what made each stage."""
        return {stage: digest for stage, (_, digest) in self.stages.items()}


def read_manifest(store: Store) -> Manifest | None:
    """The manifest of a run; None where no run has begun."""
    place = store.place(MANIFEST)
    try:
        found = json.loads(store.read(MANIFEST))
        layout = found["layout"]
        stages = {name: (dict(one["identity"]), str(one["sha256"])) for name, one in found["stages"].items()}
        if layout != _LAYOUT:
            raise InputError(f"{place} has layout {layout}; expected {_LAYOUT}; use the version of rpo that wrote it")
        return Manifest(stages, *(int(found[name]) for name in ("records", "shards", "shard")))
    except FileNotFoundError:
        return None
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{place} is damaged ({type(error).__name__}: {error}); expected the manifest of a run; restore it, or "
            "use another place"
        ) from error


def claim(
    store: Store,
    identities: Mapping[StageName, Identity],
    cut: tuple[int, int, int],
    marks: Collection[ShardMark] = (),
    redo: StageName | None = None,
) -> Manifest:
    """Write down what makes the records of each stage, or compare it with what made them before.

    Args:
        identities: Of the stages that this run does, in their order.
        cut: Records, shards and records of a shard of the plan.
        marks: Of the shards that are sealed.
        redo: The first stage that may be made otherwise than before.
    """
    before = read_manifest(store)
    known = dict(before.stages) if before is not None else {}
    if before is not None and before.shard != cut[2] and marks:
        raise InputError(
            f"shard is {cut[2]}, and {store.address} was begun with shards of {before.shard}; expected one way to cut "
            f"a run; give shard={before.shard}, or another output"
        )
    for stage, identity in identities.items():
        old, old_hash = known.get(stage, ({}, ""))
        may_change = redo is not None and STAGES.index(stage) >= STAGES.index(redo)
        if before is not None and old_hash not in ("", identity_hash(identity)) and not may_change:
            place = STAGES.index(stage)
            if any(mark.num_stages(before.made_by) > place for mark in marks):
                raise _made_otherwise(store, stage, old, identity, old_hash)
        known[stage] = dict(identity), identity_hash(identity)
    manifest = Manifest(known, *cut)
    if manifest.made_by != (before.made_by if before else None) or cut != (before.records, before.shards, before.shard):  # pyright: ignore[reportOptionalMemberAccess]
        rows = {stage: {"identity": as_written(one), "sha256": digest} for stage, (one, digest) in known.items()}
        sizes = dict(zip(("records", "shards", "shard"), cut, strict=True))
        text = json.dumps({"layout": _LAYOUT, **sizes, "stages": rows}, indent=2, ensure_ascii=False)
        store.write(MANIFEST, (text + "\n").encode())
    return manifest


def identity_hash(identity: Identity) -> str:
    """One sha256 of everything that an identity says."""
    return hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()


def _made_otherwise(store: Store, stage: StageName, old: Identity, new: Identity, old_hash: str) -> InputError:
    kept = as_written(dict(new))
    changed = sorted(key for key in {*old, *new} if old.get(key) != kept.get(key))
    changed = changed or sorted(key for key in new if new[key] != kept[key])  # the environment has another value
    values = "; ".join(f"{key} was {_shown(old, key)} and is {_shown(new, key)}" for key in changed)
    return InputError(
        f"{store.address}: the records of stage '{stage}' were made otherwise: {values} (sha256 of all settings of "
        f"the stage: {old_hash} and {identity_hash(new)}); expected one way for all records of a run; repeat the old "
        f"setting, use another output, or give redo={stage} to do this stage and those after it again"
    )


def _shown(identity: Identity, key: str) -> str:
    return repr(identity[key]) if key in identity else "not set"


M = TypeVar("M", ShardMark, "_Place")


@final
class CurationRun:
    """A run to read from, finished or at work; of each shard it sees what was sealed last.

    Attributes:
        store: Where it lies.
        manifest: What made it.
    """

    def __init__(self, address: str | Path) -> None:
        """Open a run that has begun."""
        self.store = Store(address)
        manifest = read_manifest(self.store)
        if manifest is None:
            raise InputError(
                f"{address} holds no run of curation; expected a folder with {MANIFEST}; give the output of "
                "`rpo curate`"
            )
        self.manifest = manifest
        self._opened = lru_cache(2)(lambda file: opened(self.store, file))
        self._images = lru_cache(4)(self._read_images)  # a pass over the records reads each image once

    def marks(self) -> Iterator[tuple[ShardMark, int]]:
        """Each sealed shard's mark, with how many of its stages count; in the order of the plan."""
        made_by = self.manifest.made_by
        for mark in read_marks(self.store):
            num_stages = mark.num_stages(made_by)
            if mark.number < self.manifest.shards and num_stages:
                yield mark, num_stages

    def shards(self) -> Iterator[Shard]:
        """What each sealed shard says, without images."""
        for old, _ in self.marks():
            file, mark = self._sealed_last(old)
            if num_stages := mark.num_stages(self.manifest.made_by):
                shard = read(file, mark)
                shard.forget(num_stages)
                yield shard

    def tally(self) -> Tally:
        """What the run has come to, of the marks alone."""
        found = Tally()
        for mark, num_stages in self.marks():
            found += mark.tally.through(num_stages)
        return found

    def identities(self) -> dict[str, Identity]:
        """What made the records of each stage that was begun."""
        return {stage: identity for stage, (identity, _) in self.manifest.stages.items()}

    def identity_of(self, stage: StageName) -> Identity:
        """What made the records of a stage; empty if it was not begun."""
        return self.identities().get(stage, {})

    def image_bytes(self, digest: str, order: int, record: str) -> bytes:
        """An encoded image of the record that is called so, at a place of the plan."""
        mark = self._index[bisect_right(self._index, order, key=lambda one: one.start) - 1]
        found = self._images(mark, (order - mark.start) // ROWS_AT_ONCE)
        data = found.get(digest)
        if data is None or hashlib.sha256(data).hexdigest() != digest:
            told = self.store.place(mark_name(mark.number))
            raise InputError(
                f"{record}: the image {digest} is not in {self.store.place(mark.file)}; expected every image that a "
                f"record names; restore it, or delete {told} and run again with --resume"
            )
        return data

    @cached_property
    def _index(self) -> list["_Place"]:
        return [_Place(mark.start, mark.number, mark.file) for mark, _ in self.marks()]

    def _read_images(self, mark: "_Place", group: int) -> dict[str, bytes]:
        return read_images(self._sealed_last(mark)[0], group)

    def _sealed_last(self, mark: M) -> tuple["pq.ParquetFile", M | ShardMark]:
        """The file of a shard, or that of what was sealed of it since its mark was read; with its mark."""
        try:
            return self._opened(mark.file), mark
        except InputError:
            now = mark_of(self.store, mark.number)
            if now is None or now.file == mark.file:
                raise
            return self._sealed_last(now)


class _Place(NamedTuple):
    """Where the records from a place of the plan on are kept."""

    start: int
    number: int
    file: str
