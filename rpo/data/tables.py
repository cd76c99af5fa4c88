"""Opening what `datasets` can open (parquet, folders, saved tables, hub ids), with its images left encoded."""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rpo.data.preference import ImageSource

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder, IterableDataset

Table = TypeVar("Table", "Dataset", "IterableDataset")

_SAVED_TABLE_MARKS = ("state.json", "dataset_dict.json")


def open_table(source: str | Path, *, split: str, cache_dir: str | Path | None) -> "Dataset":
    """The rows of a source, indexable; they are memory-mapped, not held.

    Args:
        source: A parquet file, a folder, a folder of `save_to_disk`, or a hub id.
        split: Which split.
        cache_dir: Where `datasets` keeps what it converts or downloads; None for its own place.

    Raises:
        ValueError: There is no such source or split.
    """
    import datasets  # not at the top: it takes most of a second to load

    if is_saved_table(source):
        found = datasets.load_from_disk(str(source))
        if isinstance(found, datasets.Dataset):
            return _encoded_images(found)
        if split not in found:
            raise ValueError(f"{source}: there is no split {split!r}; expected one of {', '.join(found)}; name one")
        return _encoded_images(found[split])
    path, files = _address(source, split)
    try:
        table = datasets.load_dataset(path, data_files=files, split=split, cache_dir=_text(cache_dir))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise _not_opened(source, error) from error
    return _encoded_images(table)


def open_stream(source: str | Path, *, split: str, cache_dir: str | Path | None) -> tuple["IterableDataset", str]:
    """The rows of a source one after the other, nothing stored, and a fingerprint of source, version and split.

    Args:
        source: A parquet file, a folder, or a hub id.
        split: Which split.
        cache_dir: Where `datasets` keeps its own notes; None for its own place.

    Raises:
        ValueError: There is no such source or split, or streaming it has no use.
    """
    import datasets  # not at the top: it takes most of a second to load

    if is_saved_table(source):
        raise ValueError(f"{source}: this table is on this disk and indexable; expected a remote one; do not stream it")
    path, files = _address(source, split)
    try:
        builder = datasets.load_dataset_builder(path, data_files=files, cache_dir=_text(cache_dir))
        rows = builder.as_streaming_dataset(split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise _not_opened(source, error) from error
    return _encoded_images(rows), _fingerprint(builder, split)


def is_saved_table(source: str | Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return any((Path(source) / mark).is_file() for mark in _SAVED_TABLE_MARKS)


def image_in(table: "Dataset", index: int, column: str) -> ImageSource:
    """The encoded image in one cell of a table; it is read when it is asked for."""
    return Cell(table, index, column)


@dataclass(frozen=True)
class Cell:
    """One encoded image of a table, read when it is called."""

    table: "Dataset"
    index: int
    column: str

    def __call__(self) -> bytes:
        """Its bytes."""
        return encoded_bytes(self.table[self.index][self.column])

    @property
    def stamp(self) -> str:
        """What stands for its content, which a path in the cell does not: another table has another fingerprint."""
        return f"{self.table._fingerprint}|{self.index}|{self.column}" if _holds_bytes(self.table, self.column) else ""


@functools.lru_cache(maxsize=8)
def _holds_bytes(table: "Dataset", column: str) -> bool:
    import pyarrow
    import pyarrow.compute

    cells = table.data.column(column)
    if pyarrow.types.is_struct(cells.type):
        cells = pyarrow.compute.struct_field(cells, "bytes")
    return cells.null_count == 0 and (pyarrow.types.is_binary(cells.type) or pyarrow.types.is_large_binary(cells.type))


def encoded_bytes(value: object) -> bytes:
    """The encoded image that the value of a cell stands for: its bytes, or the file that it names.

    Raises:
        ValueError: The cell is empty or holds something else.
        OSError: The file that it names cannot be read.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and "://" in value:
        import fsspec  # a remote folder of images is the only case that needs it

        with fsspec.open(value, "rb") as file:
            return file.read()
    if not value or not isinstance(value, str | bytes):
        raise ValueError(f"the cell holds {type(value).__name__ if value else 'nothing'}, not an encoded image")
    return Path(value).read_bytes() if isinstance(value, str) else value


def _encoded_images(table: Table) -> Table:
    import datasets

    for column, feature in (table.features or {}).items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
    return table


def _address(source: str | Path, split: str) -> tuple[str, dict[str, str] | None]:
    path = Path(source)
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"{path}: a {path.suffix or 'nameless'} file; expected .jsonl or .parquet; convert it")
        return "parquet", {split: str(path)}
    if not path.exists() and _is_no_hub_id(source):
        raise ValueError(f"{path} does not exist; expected a folder or file of preference pairs; correct the path")
    return str(source), None


def _is_no_hub_id(source: str | Path) -> bool:
    if isinstance(source, Path):
        return True
    return source.startswith((".", "/", "~")) or source.endswith((".jsonl", ".parquet")) or source.count("/") > 1


def _not_opened(source: str | Path, error: Exception) -> ValueError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ValueError(
        f"{source} cannot be opened ({reason}); expected a folder with metadata.jsonl, parquet, or a `datasets` id "
        "with this split; correct the source or the split"
    )


def _fingerprint(builder: "DatasetBuilder", split: str) -> str:
    """Changes with the source: `builder.hash` covers the commit of a hub id and the dates of local files."""
    parts = f"{builder.dataset_name} {builder.config_id} {builder.hash} {split}"
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)
