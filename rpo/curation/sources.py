"""What is going to be criticised: a plan of records, each with its caption, and where its image comes from.

The plan is made before anything is spent: every caption is there, every record has its id, and a record that cannot be
used ends the run in an error that names it. The id is a hash of the caption and of where the image comes from, so that
the same plan has the same ids in every process and in every run.
"""

import hashlib
import json
import pickle
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Literal

from PIL.Image import Image

from rpo.curation.curate_config import SHARD, SourceConfig
from rpo.curation.store.keys import Keys, key_of
from rpo.curation.store.mark import Identity, ShardMark
from rpo.curation.store.shard import Shard, plan_of
from rpo.data.image_facts import ImageFacts, ImageSource, facts_of, read_image, recalled
from rpo.data.own_files import is_own, own_file
from rpo.data.pixels import decode_image
from rpo.data.preference import SIDES, Side, recalled_pairs
from rpo.data.readers import read_pairs
from rpo.data.tables import Cell, home_of, open_table
from rpo.data.writers import METADATA
from rpo.errors import InputError
from rpo.files.text import read_text, text_fault
from rpo.files.whole import numbered_lines, parse_line

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Planned:
    """A record to be, before its image is there."""

    id: str
    caption: str
    origin: Mapping[str, str | int]
    """Where the image comes from, for whoever reads the record."""
    name: str
    """What messages call it."""
    group: str = ""
    """Id of the record that it must be done together with; the two sides of a pair have one. Empty for its own."""
    side: Side | Literal[""] = ""
    """Which side of a pair it was."""
    image: ImageSource | None = field(default=None, repr=False, compare=False)
    """Where the image is, of an import."""

    @property
    def together(self) -> str:
        """What the records that are done together have in common."""
        return self.group or self.id


@dataclass(frozen=True)
class PlannedShard:
    """The records of one shard, packed, so that a plan of tens of millions fits into memory and through a pipe."""

    number: int
    start: int
    """Place of the first record in the plan."""
    records: int
    plan: str
    """sha256 of the ids."""
    packed: bytes = field(repr=False)

    @property
    def items(self) -> list[Planned]:
        """The records."""
        return pickle.loads(zlib.decompress(self.packed))

    def opened(self, mark: ShardMark | None = None) -> Shard:
        """The shard, with nothing done; its mark, if what is sealed of it does not count."""
        items = self.items
        shard = Shard(self.number, self.start, [item.id for item in items], {item.id: item for item in items})
        shard.mark = mark
        return shard


@dataclass(frozen=True)
class SourcePlan:
    """All records, in order, cut to shards, and how to get their images."""

    shards: Sequence[PlannedShard]
    identity: Identity
    """What decides the images."""
    draw: Callable[[Sequence[Planned]], Sequence[Image]]
    """The RGB images of some records."""
    is_import: bool
    """Whether the images are there already: then all are read before anything is spent on any."""
    num_duplicates: int = 0
    """Images that came again with the same caption; they are done once."""

    @property
    def records(self) -> int:
        """How many there are."""
        return sum(one.records for one in self.shards)

    @property
    def items(self) -> list[Planned]:
        """All records, unpacked."""
        return [item for shard in self.shards for item in shard.items]


def cut_to_shards(items: Iterable[Planned], size: int) -> list[PlannedShard]:
    """Records in shards of about `size`, none of those torn apart that are done together."""
    shards: list[PlannedShard] = []
    waiting: list[Planned] = []
    start = 0
    for together in _groups(items):
        waiting += together
        if len(waiting) >= size:
            shards.append(_packed(len(shards), start, waiting))
            start, waiting = start + len(waiting), []
    return [*shards, _packed(len(shards), start, waiting)] if waiting else shards


def _groups(items: Iterable[Planned]) -> Iterator[list[Planned]]:
    return (list(some) for _, some in groupby(items, lambda item: item.together))


def _packed(number: int, start: int, items: list[Planned]) -> PlannedShard:
    packed = zlib.compress(pickle.dumps(items), 1)
    return PlannedShard(number, start, len(items), plan_of([item.id for item in items]), packed)


def record_id(caption: str, origin: str) -> str:
    """The id of a record: 16 hexadecimal digits.

    Args:
        origin: A key of where the image comes from, such as its sha256.
    """
    return hashlib.sha256(json.dumps([caption, origin]).encode()).hexdigest()[:16]


def planned(caption: object, origin: Mapping[str, str | int], key: str, name: str) -> Planned:
    """A record with a caption that can be used."""
    if not isinstance(caption, str):
        raise InputError(f"{name}: the caption is {caption!r}; expected text; mend or remove the item")
    if fault := text_fault(caption):
        raise InputError(f"{name}: the caption {fault}; expected plain text; mend or remove the item")
    if not caption.strip():
        raise InputError(
            f"{name}: the caption is empty; expected what the image should show; write it or remove the item"
        )
    return Planned(record_id(caption, key), caption, origin, name)


@dataclass
class _Found:
    """An image with its caption, before anybody has looked at it."""

    name: str
    caption: object
    image: ImageSource
    origin: Mapping[str, str | int]
    facts: dict[str, ImageFacts] = field(default_factory=dict)

    def planned(self) -> Planned:
        if not self.facts:
            name = f"{self.name}: the image"
            self.facts[""] = facts_of(read_image(self.image, name), name)
        return planned(self.caption, self.origin, self.facts[""].digest, self.name)


def plan_import(config: SourceConfig, shard: int = SHARD) -> SourcePlan:
    """The plan of an import; reads every caption and the bytes of images that are not known yet, and decodes none.

    Args:
        shard: Records of a shard, about.
    """
    if not config.path:
        raise InputError(f"source.path is empty; expected what to import as {config.kind}; give source.path=PATH")
    seen, num_found = Keys(), 0

    def new() -> Iterator[Planned]:
        nonlocal num_found
        for item in _in_pairs(config) if config.kind == "pairs" else _imported(config):
            num_found += 1
            if seen.add(key_of(item.id)):
                yield item

    shards = cut_to_shards(new(), shard)
    if not shards:
        raise InputError(f"{config.path} holds no images; expected at least one with a caption; look at source.kind")
    identity = {"kind": config.kind, "from": Path(config.path).name, "split": config.split}
    if config.kind != "pairs":
        identity["caption_column"] = config.caption_column
    return SourcePlan(shards, identity, read_planned, True, num_found - len(seen))


def read_planned(items: Sequence[Planned]) -> list[Image]:
    """The images of an import."""
    found: list[Image] = []
    for item in items:
        assert item.image is not None
        name = f"{item.name}: the image"
        found.append(decode_image(read_image(item.image, name), name).image)
    return found


def _imported(config: SourceConfig) -> Iterator[Planned]:
    found = islice(_in_folder(config) if config.kind == "folder" else _in_table(config), config.limit)
    for one in recalled(found, lambda one: [(one.facts, "", one.image)]):
        yield replace(one.planned(), image=one.image)


def _in_folder(config: SourceConfig) -> Iterator[_Found]:
    folder = Path(config.path)
    if not folder.is_dir():
        raise InputError(f"source.path is {config.path!r}, which is no folder; expected a folder of images; correct it")
    captions = _captions_of_lines(folder, config) if (folder / METADATA).is_file() else _captions_beside(folder)
    for name, path, caption in captions:
        yield _Found(name, caption, path, {"kind": "folder", "file": path.relative_to(folder).as_posix()})


def _captions_of_lines(folder: Path, config: SourceConfig) -> Iterator[tuple[str, Path, object]]:
    for name, text in numbered_lines(folder / METADATA):
        row = parse_line(text, name)
        file_name = row.get("file_name")
        if not isinstance(file_name, str) or config.caption_column not in row:
            raise InputError(
                f"{name}: found {', '.join(row) or 'nothing'}; expected file_name and {config.caption_column}; rename "
                "them, or name the caption's by source.caption_column"
            )
        try:
            path = own_file(folder, file_name)
        except ValueError as error:
            raise InputError(f"{name}: file_name {error}") from error
        yield name, path, row[config.caption_column]


def _captions_beside(folder: Path) -> Iterator[tuple[str, Path, object]]:
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES):
        name, text = path.relative_to(folder).as_posix(), path.with_suffix(".txt")
        if not text.is_file():
            raise InputError(
                f"{name}: there is no {text.name} beside it, nor {METADATA} in {folder}; expected a caption; write it"
            )
        if strangers := [file.name for file in (path, text) if not is_own(folder, file)]:
            raise InputError(f"{strangers[0]} is a link that leads out of {folder}; expected a file; put it there")
        yield name, path, read_text(text).strip()


def _in_table(config: SourceConfig) -> Iterator[_Found]:
    table = open_table(config.path, split=config.split, cache_dir=None)
    missing = {config.image_column, config.caption_column} - set(table.column_names)
    if missing:
        raise InputError(
            f"{config.path}: there is no column {', '.join(sorted(missing))} among {', '.join(table.column_names)}; "
            "expected one of images and one of captions; name them by source.image_column and source.caption_column"
        )
    home = home_of(config.path, None)
    images = table.select_columns([config.image_column])
    captions = table.select_columns([config.caption_column])
    for index, row in enumerate(captions):
        image = Cell(images, index, config.image_column, home)
        yield _Found(f"{config.path} row {index}", row[config.caption_column], image, {"kind": "table", "row": index})


def _in_pairs(config: SourceConfig) -> Iterator[Planned]:
    # Pairs of two sizes are welcome: each side is edited on its own.
    for pair in recalled_pairs(
        read_pairs(config.path, split=config.split, limit=config.limit, allow_size_mismatch=True)
    ):
        keys = {side: f"pair/{pair.key}/{side}" for side in SIDES}
        group = record_id(pair.prompt, keys["chosen"])
        for side in SIDES:
            origin = {"kind": "pair", "pair": pair.key, "side": side, "from": pair.source or Path(config.path).name}
            record = record_id(pair.prompt, keys[side])
            image = pair.chosen if side == "chosen" else pair.rejected
            yield Planned(record, pair.prompt, origin, f"{pair.name}, {side} image", group, side, image)
