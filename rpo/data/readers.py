"""Finding preference records: folders and files on this disk, tables and ids of `datasets`, rows of a program.

`scan` reads everything and collects what is wrong with single records; `read_pairs` is `scan` and refuses a set in
which anything is wrong. Rows without a preference (ties, unlabelled ones) are left out and counted: a tie that is kept
would count as a win of its first image.
"""

import atexit
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
from filelock import FileLock
from PIL.Image import Image

from rpo.data.columns import FORMS, AnyForm, Dropped, FormName, Row, ignored, parse, recognise
from rpo.data.image_facts import ImageSource, read_image
from rpo.data.pixels import rgb
from rpo.data.preference import PairSet, PreferencePair, counted, encode_png, recalled_pairs, require_sound
from rpo.data.rows import RowFiles, lines_of, open_rows, require_split
from rpo.data.tables import (
    Cell,
    Home,
    empty_cells,
    encoded_bytes,
    encoded_images,
    home_of,
    home_of_table,
    open_stream,
    open_table,
)
from rpo.data.writers import METADATA, RecordFolder
from rpo.errors import InputError
from rpo.files.whole import append_line, mend_last_line, read_lines

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset

PairSource: TypeAlias = (
    "str | Path | PairSet | Dataset | DatasetDict | IterableDataset | Sequence[Mapping[str, object] | PreferencePair]"
)
"""What holds pairs: a folder, a file, a hub id; or, from a program, a set, a table, a list of rows or of records."""

_LEFT_OUT = "left_out.jsonl"


@dataclass(frozen=True)
class Scan:
    """What a source was found to hold, sound or not."""

    origin: str
    pairs: list[PreferencePair] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """One message for each row that is no record."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows that hold no preference, by reason."""
    ignored_columns: tuple[str, ...] = ()

    def take(self, read: Callable[[], PreferencePair | Dropped]) -> None:
        """Read one row and put it where it belongs."""
        try:
            found = read()
        except ValueError as error:
            self.faults.append(str(error))
            return
        if isinstance(found, Dropped):
            self.dropped[found.reason] += 1
        else:
            self.pairs.append(found)


def read_pairs(
    source: PairSource,
    *,
    split: str = "train",
    form: AnyForm = "auto",
    limit: int | None = None,
    streaming: bool = False,
    cache_dir: str | Path | None = None,
    allow_size_mismatch: bool = False,
    allow_empty_prompts: bool = False,
    skip_faulty: bool = False,
) -> PairSet:
    """Read a preference set, and refuse it if any of its records is not sound.

    Args:
        source: A folder with `metadata.jsonl` or `metadata.csv`, of `chosen` and `rejected` images, of `.jsonl`,
            `.tar` or parquet files; such a file, or a `.json` list; a table saved by `datasets`, a `datasets` id; or,
            from a program, a table of `datasets` or a list of rows, whose images may be PIL's.
        split: Which split of a source that has several.
        form: The columns to expect, by a name of `rpo.data.columns.FORMS`: "native" (prompt, chosen, rejected),
            "files" (prompt, chosen_file_name, rejected_file_name), "pickapic" …; "auto" looks.
        limit: Read only the first rows of the source; ties count as rows. An `IterableDataset` needs one.
        streaming: Take the first `limit` rows of a remote source without downloading the rest. They are kept in a
            local folder, and a later call goes on where an earlier one ended.
        cache_dir: Where downloads and streamed rows are kept; None for the place where `datasets` keeps its own.
        allow_size_mismatch: Accept pairs of two sizes, as Pick-a-Pic has them. Images are then not opened before use.
        allow_empty_prompts: Accept records without a prompt.
        skip_faulty: Leave out and count records that are not sound, instead of refusing the set; for sets of the size
            of Pick-a-Pic.

    Raises:
        ValueError: The source cannot be opened, holds no preference, or a record is not sound; the message names it.

    Example:
        >>> pairs = read_pairs("yuvalkirstain/pickapic_v2", streaming=True, limit=1000, allow_size_mismatch=True)
    """
    found = scan(source, split=split, form=form, limit=limit, streaming=streaming, cache_dir=cache_dir)
    pairs: list[PreferencePair] = []
    faults = found.faults
    for pair in found.pairs if allow_size_mismatch else recalled_pairs(found.pairs):
        try:
            require_sound(pair, allow_size_mismatch=allow_size_mismatch, allow_empty_prompts=allow_empty_prompts)
            pairs.append(pair)
        except ValueError as error:
            faults.append(str(error))
    if faults and not skip_faulty:
        more = f" (and {len(faults) - 1} more; `rpo data check` lists them)" if len(faults) > 1 else ""
        raise InputError(faults[0] + more)
    dropped = found.dropped + Counter(faulty=len(faults))
    if not pairs:
        why = f"all {dropped.total()} rows were left out ({counted(dropped)})" if dropped else "it holds no records"
        raise InputError(
            f"{found.origin}: {why}; expected a row with a preferred image; label more pairs, or look at how "
            "the file was written"
        )
    return PairSet(tuple(pairs), found.origin, dict(dropped), found.ignored_columns)


def pairs_from(source: PairSource) -> PairSet:
    """A set as it is, or read from whatever else it is given as."""
    pairs = source if isinstance(source, PairSet) else read_pairs(source)
    if not len(pairs):
        raise InputError("the preference set is empty, but at least one pair is needed; see `rpo data check`")
    return pairs


def scan(
    source: PairSource,
    *,
    split: str = "train",
    form: AnyForm = "auto",
    limit: int | None = None,
    streaming: bool = False,
    cache_dir: str | Path | None = None,
) -> Scan:
    """Read every row of a source, and collect the faults of single rows instead of stopping at the first."""
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; expected at least 1 row; leave it out to read all")
    if isinstance(source, PairSet):
        return Scan(source.origin, list(source)[:limit], [], Counter(source.dropped), source.ignored_columns)
    if not isinstance(source, str | Path):
        return _scan_given(source, split, form, limit, cache_dir)
    if files := open_rows(Path(source), split):
        if streaming:
            raise InputError(f"{files.origin} is on this disk already; expected a remote source; do not stream it")
        return _scan_rows(files, form, limit)
    if streaming:
        return _scan_stream(source, split, form, limit, cache_dir)
    table = open_table(source, split=split, cache_dir=cache_dir)
    return _scan_table(table, str(source), form, limit, home_of(source, cache_dir))


def _scan_given(source: object, split: str, form: AnyForm, limit: int | None, cache_dir: str | Path | None) -> Scan:
    """What a program hands in: a table of `datasets`, or a list of rows or records."""
    if isinstance(source, Sequence) and not isinstance(source, bytes):
        found, columns = Scan("pairs"), set[str]()
        for number, row in enumerate(islice(cast("Sequence[object]", source), limit)):
            found.take(partial(_given, row, f"pairs[{number}]", form, columns))
        return replace(found, ignored_columns=tuple(sorted(columns)))
    import datasets  # not at the top: it takes most of a second to load

    table = source
    if isinstance(source, datasets.DatasetDict | datasets.IterableDatasetDict):
        splits = cast("Mapping[str, Dataset]", source)
        require_split("the table", split, *splits)
        table = splits[split]
    if isinstance(table, datasets.Dataset):
        return _scan_table(encoded_images(table), "the table", form, limit, home_of_table(table))
    if isinstance(table, datasets.IterableDataset):
        most, folder = _limit_of("the table", limit), mkdtemp(prefix="given-", dir=_streams(cache_dir))
        atexit.register(rmtree, folder, ignore_errors=True)  # nothing tells whether the next one is the same
        return _scan_copy(encoded_images(table), Path(folder) / "rows", form, most, "the table", home_of_table(table))
    raise InputError(
        f"pairs are a {type(source).__name__}; expected a folder, a file, a hub id, a Dataset, or a list of rows with "
        "prompt, chosen and rejected; give one of these"
    )


def _given(row: object, name: str, form: AnyForm, unused: set[str]) -> PreferencePair | Dropped:
    """The record of a row; columns that it makes no use of join `unused`."""
    if isinstance(row, PreferencePair):
        return row if row.name else replace(row, name=name)
    if not isinstance(row, Mapping):
        raise InputError(f"{name}: a {type(row).__name__}; expected a row with prompt, chosen and rejected; give it so")
    columns = cast("Mapping[str, object]", row)

    def image_of(column: str) -> ImageSource:
        value = columns[column]
        if isinstance(value, Image):
            return encode_png(np.asarray(rgb(value)))
        if isinstance(value, bytes | Path) or (isinstance(value, str) and "://" not in value):
            return value
        raise InputError(f"{name}: an image is {value!r:.80}; expected a PIL image, a file, or encoded bytes; give one")

    found_form = recognise(columns, name, form)
    unused.update(ignored(columns, found_form))
    return parse(found_form, columns, image_of, name=name)


def _scan_rows(files: RowFiles, form: AnyForm, limit: int | None) -> Scan:
    columns: set[str] = set()

    def read(name: str, row_of: Callable[[], Row]) -> PreferencePair | Dropped:
        row = row_of()
        found_form = recognise(row, name, form)
        columns.update(ignored(row, found_form))
        return parse(found_form, row, partial(files.image_of, row, name), name=name)

    found = Scan(str(files.origin))
    for name, row_of in islice(files.rows, limit):
        found.take(partial(read, name, row_of))
    return replace(found, ignored_columns=tuple(sorted(columns)))


def _scan_table(table: "Dataset", origin: str, form: AnyForm, limit: int | None, home: Home) -> Scan:
    found_form = recognise(table.column_names, origin, form)
    columns = FORMS[found_form]
    found = Scan(origin, ignored_columns=ignored(table.column_names, found_form))
    pictures = [column for column in (*columns.images, columns.original) if column in table.column_names]
    images = {column: table.select_columns([column]) for column in pictures}
    unedited = empty_cells(images[columns.original], columns.original) if columns.original in images else ()
    text = [column for column in table.column_names if column in columns.text + columns.optional]
    for index, row in enumerate(islice(table.select_columns(text), limit)):  # no image is read here
        cells = {column: Cell(image, index, column, home) for column, image in images.items()}
        if index in unedited:
            del cells[columns.original]
        found.take(partial(parse, found_form, {**cells, **row}, cells.__getitem__, name=f"{origin} row {index}"))
    return found


def _scan_stream(
    source: str | Path, split: str, form: AnyForm, limit: int | None, cache_dir: str | Path | None
) -> Scan:
    """The first rows of a remote source; a later call goes on where an earlier one of the same version ended."""
    most = _limit_of(source, limit)
    rows, fingerprint = open_stream(source, split=split, cache_dir=cache_dir)
    slug = re.sub(r"[^A-Za-z0-9]+", "-", str(source)).strip("-")[-60:]
    folder = _streams(cache_dir) / f"{slug}-{fingerprint}"
    return _scan_copy(rows, folder, form, most, str(source), home_of(source, cache_dir))


def _limit_of(origin: object, limit: int | None) -> int:
    if limit is None:
        raise InputError(
            f"{origin}: read row by row without a limit; expected the number of rows to keep; give limit=…"
        )
    return limit


def _streams(cache_dir: str | Path | None) -> Path:
    import datasets  # not at the top: it takes most of a second to load

    streams = Path(datasets.config.HF_DATASETS_CACHE) / "rpo_streams" if cache_dir is None else Path(cache_dir)
    streams.mkdir(parents=True, exist_ok=True)
    return streams


def _scan_copy(rows: "IterableDataset", place: Path, form: AnyForm, limit: int, origin: str, home: Home) -> Scan:
    """The first rows of what can only be iterated over, brought onto this disk so that training can index them.

    Each row leaves one line, with its number in the source: in `metadata.jsonl` if it is a record, in `left_out.jsonl`
    with the reason if it is not. The largest number says where to go on, so an interrupted call loses nothing. The
    folder's name covers the version of the source: when that changes, a new folder is begun.
    """
    columns = rows.column_names or list(next(iter(rows), {}))
    found_form = recognise(columns, origin, form)
    folder = place.with_name(f"{place.name}-{found_form}")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # the ranks of one training run read the same source at once
        _copy(rows, folder, found_form, limit, origin, home)
    kept = _scan_rows(lines_of(folder / METADATA), "files", limit=None)
    found = Scan(origin, [pair for pair in kept.pairs if _row_number(pair.details) < limit])
    for row in read_lines(folder / _LEFT_OUT):
        if _row_number(row) < limit:
            found.faults.extend([str(row["fault"])] if "fault" in row else [])
            found.dropped.update([str(row["reason"])] if "reason" in row else [])
    found.faults.extend(kept.faults)
    return replace(found, ignored_columns=ignored(columns, found_form))


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


def _keep(records: RecordFolder, form: FormName, row: Row, name: str, home: Home, number: int) -> str | None:
    """Store one row; if it holds no preference, say why instead."""

    def image_of(column: str) -> bytes:
        return read_image(partial(encoded_bytes, row[column], home), f"{name}: {column}")

    found = parse(form, row, image_of, name=name)
    if isinstance(found, Dropped):
        return found.reason
    records.append(replace(found, details={**found.details, "source_row": number}))
    return None


def _row_number(row: Row) -> int:
    number = row["source_row"]
    assert isinstance(number, int)
    return number
