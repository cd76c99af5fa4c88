"""The first rows of a remote set, kept in a local folder so that training can index them.

Each row leaves one line, with its number in the source: in `metadata.jsonl` if it is a record, in `left_out.jsonl` with
the reason if it is not. The largest number says where to go on, so an interrupted call loses nothing. The folder's name
covers the version of the source: when that changes, a new folder is begun.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from filelock import FileLock

from rpo.data.columns import Dropped, FormName, ignored, parse, recognise
from rpo.data.tables import Home, encoded_bytes, home_of, open_stream
from rpo.data.writers import RecordFolder
from rpo.errors import InputError
from rpo.files import append_line, mend_last_line, read_lines

if TYPE_CHECKING:
    from datasets import IterableDataset

_LEFT_OUT = "left_out.jsonl"


@dataclass(frozen=True)
class LocalCopy:
    """The rows of a stream that are on this disk."""

    metadata: Path
    """The records, one a line; `source_row` numbers them."""
    dropped: Counter[str]
    """Rows without a preference, by reason."""
    faults: tuple[str, ...]
    """One message for each row that is no record."""
    ignored_columns: tuple[str, ...]


def local_copy(
    source: str | Path,
    *,
    split: str,
    form: FormName | Literal["auto"],
    limit: int | None,
    cache_dir: str | Path | None,
) -> LocalCopy:
    """Bring the first rows of a source onto this disk, going on after those that are here already.

    Args:
        source: A `datasets` id or another source that `datasets` can stream.
        cache_dir: Where the folder is made; None for the place where `datasets` keeps its own.
    """
    if limit is None:
        raise InputError(f"{source}: streaming=True without a limit; expected the number of rows to keep; give limit=…")
    rows, fingerprint = open_stream(source, split=split, cache_dir=cache_dir)
    columns = rows.column_names or list(next(iter(rows)))
    found_form = recognise(columns, str(source), form)
    slug = re.sub(r"[^A-Za-z0-9]+", "-", str(source)).strip("-")[-60:]
    folder = _streams_folder(cache_dir) / f"{slug}-{fingerprint}-{found_form}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # the ranks of one training run read the same source at once
        _copy(rows, folder, found_form, limit, str(source), home_of(source, cache_dir))
    left_out = [row for row in read_lines(folder / _LEFT_OUT) if _row_number(row) < limit]
    return LocalCopy(
        metadata=RecordFolder(folder).metadata,
        dropped=Counter(str(row["reason"]) for row in left_out if "reason" in row),
        faults=tuple(str(row["fault"]) for row in left_out if "fault" in row),
        ignored_columns=ignored(columns, found_form),
    )


def _copy(rows: "IterableDataset", folder: Path, form: FormName, limit: int, origin: str, home: Home) -> None:
    records, left_out = RecordFolder(folder), folder / _LEFT_OUT
    mend_last_line(left_out)
    numbers = [_row_number(row) for path in (records.metadata, left_out) for row in read_lines(path)]
    start = max(numbers, default=-1) + 1
    for number, row in enumerate(islice(rows.skip(start), max(limit - start, 0)), start):
        try:
            reason = _keep(records, form, row, f"{origin} row {number}", home, number)
        except ValueError as error:
            append_line(left_out, {"source_row": number, "fault": str(error)})
            continue
        if reason is not None:
            append_line(left_out, {"source_row": number, "reason": reason})


def _keep(
    records: RecordFolder, form: FormName, row: Mapping[str, object], name: str, home: Home, number: int
) -> str | None:
    """Store one row; if it holds no preference, say why instead."""
    found = parse(form, row, lambda column: encoded_bytes(row[column], home), name=name)
    if isinstance(found, Dropped):
        return found.reason
    records.append(replace(found, details={**found.details, "source_row": number}))
    return None


def _row_number(row: Mapping[str, object]) -> int:
    number = row["source_row"]
    assert isinstance(number, int)
    return number


def _streams_folder(cache_dir: str | Path | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir)
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "rpo_streams"
