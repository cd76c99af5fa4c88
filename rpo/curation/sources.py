"""What is going to be criticised: a plan of records, each with its caption, and where its image comes from.

The plan is made before anything is spent: every caption is there, every record has its id, and a record that cannot be
used ends the run in an error that names it. The id is a hash of the caption and of where the image comes from, so that
the same plan has the same ids in every process and in every run.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from PIL.Image import Image

from rpo.curation.curate_config import SourceConfig
from rpo.curation.digests import Digests
from rpo.curation.manifest import Identity
from rpo.data.jsonl import numbered_lines, parse_line
from rpo.data.own_files import is_own, own_file, read_regular
from rpo.data.pixels import decode_image
from rpo.data.preference import SIDES, ImageSource, Side
from rpo.data.readers import read_pairs
from rpo.data.tables import home_of, image_in, open_table
from rpo.data.writers import METADATA
from rpo.text import read_text, text_fault

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


@dataclass(frozen=True)
class SourcePlan:
    """All records, in order, and how to get their images."""

    items: Sequence[Planned]
    identity: Identity
    """What decides the images."""
    draw: Callable[[Sequence[Planned]], Sequence[Image]]
    """The RGB images of some records."""
    is_import: bool
    """Whether the images are there already: then all are read before anything is spent on any."""
    num_duplicates: int = 0
    """Images that came again with the same caption; they are done once."""


def record_id(caption: str, origin: str) -> str:
    """The id of a record: 16 hexadecimal digits.

    Args:
        caption: Of the image.
        origin: A key of where the image comes from, such as its sha256.
    """
    return hashlib.sha256(json.dumps([caption, origin]).encode()).hexdigest()[:16]


def planned(caption: object, origin: Mapping[str, str | int], key: str, name: str) -> Planned:
    """A record with a caption that can be used.

    Args:
        caption: What should be one.
        origin: Where the image comes from.
        key: The same in short, for the id.
        name: What messages call it.

    Raises:
        ValueError: The caption is no text, or empty.
    """
    if not isinstance(caption, str):
        raise ValueError(f"{name}: the caption is {caption!r}; expected text; mend or remove the item")
    if fault := text_fault(caption):
        raise ValueError(f"{name}: the caption {fault}; expected plain text; mend or remove the item")
    if not caption.strip():
        raise ValueError(
            f"{name}: the caption is empty; expected what the image should show; write it or remove the item"
        )
    return Planned(record_id(caption, key), caption, origin, name)


def plan_import(config: SourceConfig, digests: Digests | None = None) -> SourcePlan:
    """The plan of an import; reads every caption and the bytes of every image, and decodes none yet.

    Args:
        config: Kind and path.
        digests: Of files, where they are remembered; those of a folder are then read once.

    Raises:
        ValueError: There is no such source, nothing in it, or an item that cannot be used; names the item.
    """
    if not config.path:
        raise ValueError(f"source.path is empty; expected what to import as {config.kind}; give source.path=PATH")
    find = {"folder": partial(_in_folder, digests=digests), "table": _in_table, "pairs": _in_pairs}[config.kind]
    images: dict[str, ImageSource] = {}
    items: list[Planned] = []
    num_found = 0
    for item, image in find(config):
        num_found += 1
        if item.id not in images:
            images[item.id] = image
            items.append(item)
    if not items:
        raise ValueError(f"{config.path} holds no images; expected at least one with a caption; look at source.kind")

    def draw(some: Sequence[Planned]) -> list[Image]:
        return [decode_image(_bytes_of(images[item.id], item.name), f"{item.name}: the image").image for item in some]

    identity = {"kind": config.kind, "from": Path(config.path).name, "split": config.split}
    if config.kind != "pairs":
        identity["caption_column"] = config.caption_column
    return SourcePlan(items, identity, draw, True, num_found - len(items))


def _in_folder(config: SourceConfig, digests: Digests | None) -> Iterator[tuple[Planned, ImageSource]]:
    folder = Path(config.path)
    if not folder.is_dir():
        raise ValueError(f"source.path is {config.path!r}, which is no folder; expected a folder of images; correct it")
    captions = _captions_of_lines(folder, config) if (folder / METADATA).is_file() else _captions_beside(folder)
    for count, (name, path, caption) in enumerate(captions):
        if config.limit is not None and count >= config.limit:
            return
        digest = _digest(path, name, digests)
        yield planned(caption, {"kind": "folder", "file": path.relative_to(folder).as_posix()}, digest, name), path


def _captions_of_lines(folder: Path, config: SourceConfig) -> Iterator[tuple[str, Path, object]]:
    for name, text in numbered_lines(folder / METADATA):
        row = parse_line(text, name)
        file_name = row.get("file_name")
        if not isinstance(file_name, str) or config.caption_column not in row:
            raise ValueError(
                f"{name}: found {', '.join(row) or 'nothing'}; expected file_name and {config.caption_column}; rename "
                "them, or name the caption's by source.caption_column"
            )
        try:
            path = own_file(folder, file_name)
        except ValueError as error:
            raise ValueError(f"{name}: file_name {error}") from error
        yield name, path, row[config.caption_column]


def _captions_beside(folder: Path) -> Iterator[tuple[str, Path, object]]:
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES):
        name, text = path.relative_to(folder).as_posix(), path.with_suffix(".txt")
        if not text.is_file():
            raise ValueError(
                f"{name}: there is no {text.name} beside it, nor {METADATA} in {folder}; expected a caption; write it"
            )
        if strangers := [file.name for file in (path, text) if not is_own(folder, file)]:
            raise ValueError(f"{strangers[0]} is a link that leads out of {folder}; expected a file; put it there")
        yield name, path, read_text(text).strip()


def _in_table(config: SourceConfig) -> Iterator[tuple[Planned, ImageSource]]:
    table = open_table(config.path, split=config.split, cache_dir=None)
    missing = {config.image_column, config.caption_column} - set(table.column_names)
    if missing:
        raise ValueError(
            f"{config.path}: there is no column {', '.join(sorted(missing))} among {', '.join(table.column_names)}; "
            "expected one of images and one of captions; name them by source.image_column and source.caption_column"
        )
    home = home_of(config.path, None)
    images = table.select_columns([config.image_column])
    captions = table.select_columns([config.caption_column])
    for index in range(min(len(table), len(table) if config.limit is None else config.limit)):
        name = f"{config.path} row {index}"
        image = image_in(images, index, config.image_column, home)
        digest = hashlib.sha256(_bytes_of(image, name)).hexdigest()
        origin = {"kind": "table", "row": index}
        yield planned(captions[index][config.caption_column], origin, digest, name), image


def _in_pairs(config: SourceConfig) -> Iterator[tuple[Planned, ImageSource]]:
    # Pairs of two sizes are welcome: each side is edited on its own.
    for pair in read_pairs(config.path, split=config.split, limit=config.limit, allow_size_mismatch=True):
        keys = {side: f"pair/{pair.key}/{side}" for side in SIDES}
        group = record_id(pair.prompt, keys["chosen"])
        for side in SIDES:
            origin = {"kind": "pair", "pair": pair.key, "side": side, "from": pair.source or Path(config.path).name}
            record = record_id(pair.prompt, keys[side])
            image = pair.chosen if side == "chosen" else pair.rejected
            yield Planned(record, pair.prompt, origin, f"{pair.name}, {side} image", group, side), image


def _digest(path: Path, name: str, digests: Digests | None) -> str:
    if digests is not None and path.is_file():  # what is none is told by whoever reads it
        return digests.of(path)
    return hashlib.sha256(_bytes_of(path, name)).hexdigest()


def _bytes_of(image: ImageSource, name: str) -> bytes:
    try:
        if isinstance(image, str | Path):
            return read_regular(image)
        return image if isinstance(image, bytes) else image()
    except (OSError, ValueError) as error:
        fault = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise ValueError(
            f"{name}: the image {fault}; expected a readable image file; restore it or remove the item"
        ) from error
