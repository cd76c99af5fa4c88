"""Opening what `datasets` can open (parquet, folders, saved tables, hub ids), with its images left encoded."""

import errno
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL.Image import Image

from rpo.data.image_facts import stamp_of
from rpo.data.own_files import is_own, own_file, read_regular
from rpo.data.pixels import rgb
from rpo.data.preference import encode_png
from rpo.data.rows import ONLY_SPLIT, require_split
from rpo.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# `datasets` is imported where it is used: it takes most of a second to load.

Table = TypeVar("Table", "Dataset", "IterableDataset")

_MADE_BY_THE_CALLER = (None, "generator", "imagefolder")  # builders whose cells name no file of somebody else's choice


@dataclass(frozen=True)
class Home:
    """Where the files lie that the cells of a table may name."""

    folder: Path | None = None
    """What names are relative to."""
    roots: tuple[Path, ...] = ()
    """Folders of the paths from the root that the reader of an image folder puts into its cells."""
    repository: str = ""
    """Hub id whose own files a stream may fetch."""


def home_of(source: str | Path, cache_dir: str | Path | None) -> Home:
    """Where the files lie that a source may name."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    downloads = datasets.config.DOWNLOADED_DATASETS_PATH if cache_dir is None else Path(cache_dir) / "downloads"
    unpacked = Path(downloads) / datasets.config.EXTRACTED_DATASETS_DIR
    path = Path(source)
    if path.exists():
        folder = path.parent if path.is_file() else path
        return Home(folder, (folder, unpacked))
    repository = Path(HF_HUB_CACHE) / f"datasets--{str(source).replace('/', '--')}"
    return Home(None, (repository, unpacked), str(source))


def home_of_table(table: "Dataset | IterableDataset") -> Home:
    """The same of a table that the caller opened: any path from the root, unless a file of cells said it."""
    is_callers = table.info.builder_name in _MADE_BY_THE_CALLER
    return Home(None, (Path(Path.cwd().anchor),) if is_callers else ())


def open_table(source: str | Path, *, split: str, cache_dir: str | Path | None) -> "Dataset":
    """The rows of a parquet file, a folder, a folder of `save_to_disk`, or a hub id, indexable and memory-mapped."""
    import datasets

    if _is_saved(source):
        try:
            found = datasets.load_from_disk(str(source))
        except Exception as error:  # a damaged file may raise anything
            raise _not_opened(source, error) from error
        if isinstance(found, datasets.Dataset):
            require_split(source, split, str(found.split or ONLY_SPLIT), ONLY_SPLIT)
            return encoded_images(found)
        require_split(source, split, *found)
        return encoded_images(found[split])
    place = _address(source, split)
    try:
        return encoded_images(datasets.load_dataset(**place, split=split, cache_dir=_text(cache_dir)))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise _not_opened(source, error) from error


def open_stream(source: str | Path, *, split: str, cache_dir: str | Path | None) -> tuple["IterableDataset", str]:
    """The rows of a source one after the other, nothing stored, and a fingerprint of source, version and split."""
    import datasets

    if _is_saved(source):
        raise InputError(f"{source}: this table is on this disk and indexable; expected a remote one; do not stream it")
    place = _address(source, split)
    try:
        builder = datasets.load_dataset_builder(**place, cache_dir=_text(cache_dir))
        rows = builder.as_streaming_dataset(split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise _not_opened(source, error) from error
    # `hash` covers the commit of a hub id and the dates of local files.
    version = f"{builder.dataset_name} {builder.config_id} {builder.hash} {split}"
    return encoded_images(rows), hashlib.sha256(version.encode()).hexdigest()[:16]


def encoded_images(table: Table) -> Table:
    """The table with its images left encoded."""
    import datasets

    for column, feature in (table.features or {}).items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
    return table


@dataclass(frozen=True)
class Cell:
    """One encoded image of a table, read when it is called."""

    table: "Dataset"
    index: int
    column: str
    home: Home

    def __call__(self) -> bytes:
        """Its bytes."""
        return encoded_bytes(self.table[self.index][self.column], self.home)


@stamp_of.register
def _(cell: Cell) -> str:
    table = _stamp_of_bytes(cell.table, cell.column)
    if table is not None:
        return table and f"{table}|{cell.index}|{cell.column}"
    value = cell.table[cell.index][cell.column]
    path = value.get("path") if isinstance(value, dict) else value
    try:
        return stamp_of(_named(path, cell.home)) if isinstance(path, str) and path else ""
    except ValueError:
        return ""  # told by whoever reads it


@functools.lru_cache(maxsize=8)
def _stamp_of_bytes(table: "Dataset", column: str) -> str | None:
    """What stands for a column of images, "" if nothing does; None for one of paths alone."""
    import pyarrow
    import pyarrow.compute

    cells = table.data.column(column)
    if pyarrow.types.is_struct(cells.type):
        cells = pyarrow.compute.struct_field(cells, "bytes")
    elif not (pyarrow.types.is_binary(cells.type) or pyarrow.types.is_large_binary(cells.type)):
        return None
    files = [Path(str(file["filename"])) for file in table.cache_files]
    if cells.null_count or not files:
        return None if cells.null_count == len(cells) else ""
    dates = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{table._fingerprint}|{dates}"


def empty_cells(table: "Dataset", column: str) -> set[int]:
    """The rows that have no image in a column, of which none is read."""
    import pyarrow
    from pyarrow import compute

    rows = list[bool]()
    for batch in table.with_format("arrow").iter(1000):
        cells = batch.column(column)
        is_split = pyarrow.types.is_struct(cells.type)
        parts = [compute.struct_field(cells, one.name) for one in cells.type] if is_split else [cells]
        rows += map(all, zip(*(part.is_null().to_pylist() for part in parts), strict=True))
    return {row for row, is_empty in enumerate(rows) if is_empty}


def encoded_bytes(value: object, home: Home) -> bytes:
    """The encoded image that the value of a cell stands for: its pixels or bytes, or the file that it names."""
    if isinstance(value, Image):
        return encode_png(np.asarray(rgb(value)))
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not value or not isinstance(value, str | bytes):
        raise InputError(f"the cell holds {type(value).__name__ if value else 'nothing'}, not an encoded image")
    if isinstance(value, bytes):
        return value
    if _is_own_address(value, home):
        import fsspec  # archives, and streamed folders of images, are the only cases that need it

        with fsspec.open(value, "rb") as file:
            return file.read()
    return read_regular(_named(value, home))


def _is_own_address(address: str, home: Home) -> bool:
    """Whether an address leads into the source: to its own hub repository, or into an archive of its own."""
    *inner, last = address.split("::")
    if ".." in address or not all(part.startswith(("zip://", "tar://", "gzip://")) for part in inner):
        return False
    if home.repository and last.startswith(f"hf://datasets/{home.repository}@"):
        return True
    return bool(inner) and Path(last).is_file() and any(is_own(root, Path(last)) for root in home.roots)


def _named(name: str, home: Home) -> Path:
    path = Path(name)
    is_from_root = "://" not in name and path.is_absolute() and ".." not in path.parts
    if is_from_root and any(is_own(root, path) for root in home.roots):
        return path
    if home.folder is None:
        raise InputError(
            f"{name!r} is no file of this table; expected the image itself in the cell, or a path that the table's own "
            "folder of images has; embed the images, or read the folder that they lie in"
        )
    return own_file(home.folder, name)


def _is_saved(source: str | Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return any((Path(source) / mark).is_file() for mark in ("state.json", "dataset_dict.json"))


def _address(source: str | Path, split: str) -> dict[str, Any]:
    """What `load_dataset` has to be told of a source."""
    path, text = Path(source), str(source)
    if path.is_file():
        if path.suffix != ".parquet":
            raise InputError(f"{path}: a {path.suffix or 'nameless'} file; expected .jsonl or .parquet; convert it")
        require_split(path, split, ONLY_SPLIT)
        return {"path": "parquet", "data_files": {split: text}}
    is_path = isinstance(source, Path) or text.startswith((".", "/", "~")) or text.endswith((".jsonl", ".parquet"))
    if not path.exists() and (is_path or text.count("/") > 1):
        raise InputError(f"{path} does not exist; expected a folder or file of preference pairs; correct the path")
    return {"path": text}


def _not_opened(source: str | Path, error: Exception) -> InputError:
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC):
        return InputError(
            f"{source} cannot be opened, since {error.filename or 'the cache of `datasets`'} cannot be read or written "
            f"({error.strerror}); expected a readable source and a writable cache, where `datasets` keeps what it "
            "converts; look at rights and room there, or name another cache in HF_DATASETS_CACHE"
        )
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return InputError(
        f"{source} cannot be opened ({reason}); expected a folder with metadata.jsonl, parquet, or a `datasets` id "
        "with this split; correct the source or the split"
    )


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)
