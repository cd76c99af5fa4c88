"""Keeping preference records: an append-only folder that survives being killed, and parquet.

The folder holds `metadata.jsonl`, one record a line, and `images/`, files named by their content. Stock `datasets`
reads it as an image folder, a person reads it in a text editor. A record is there once its line is: images are put in
place first, each by an atomic rename, so that a line never names a file that is not whole. Images are kept byte by byte
as they came, which keeps their content hash and with it every cache entry.
"""

from collections.abc import Iterable
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from rpo.data.details import DETAIL_COLUMNS, NUMBERS
from rpo.data.preference import SIDES, PreferencePair, Side
from rpo.errors import InputError
from rpo.files import append_line, mend_last_line, read_lines, written_whole

if TYPE_CHECKING:
    import pyarrow as pa

METADATA = "metadata.jsonl"
_PARQUET_ROWS = 256  # rows in memory at a time


class RecordFolder:
    """A folder of records, open for appending."""

    def __init__(self, folder: str | Path) -> None:
        """Open or create the folder; the half-written last line of a killed writer is cut off."""
        self.folder = Path(folder)
        self.metadata = self.folder / METADATA
        (self.folder / "images").mkdir(parents=True, exist_ok=True)
        mend_last_line(self.metadata)

    def append(self, pair: PreferencePair) -> None:
        """Keep one record: both images as they are encoded, then its line."""
        columns = _plain_columns(pair)
        files = {f"{side}_file_name": self._keep_image(pair, side) for side in SIDES}
        append_line(self.metadata, {"prompt": pair.prompt, **files, **columns, "key": pair.key})

    def _keep_image(self, pair: PreferencePair, side: Side) -> str:
        digest, data = pair.facts(side).digest, pair.encoded(side)
        with Image.open(BytesIO(data)) as image:
            extension = (image.format or "png").lower()
        name = f"images/{digest}.{extension}"
        if not (self.folder / name).exists():
            with written_whole(self.folder / name) as partial:
                partial.write_bytes(data)
        return name


def write_pairs(folder: str | Path, pairs: Iterable[PreferencePair]) -> int:
    """Append records to a folder; one whose prompt and images are there already is not written again.

    So an interrupted call can simply be repeated with the same records.

    Args:
        folder: Where the records are kept; created when it does not exist.
        pairs: The records.

    Returns:
        How many records were new.
    """
    records = RecordFolder(folder)
    known = {str(row.get("key")) for row in read_lines(records.metadata)}
    written = 0
    for pair in pairs:
        if pair.key not in known:
            records.append(pair)
            known.add(pair.key)
            written += 1
    return written


def write_parquet(path: str | Path, pairs: Iterable[PreferencePair]) -> None:
    """Write records as one parquet file with `datasets` features: prompt, chosen and rejected (Image), and the rest."""
    import pyarrow.parquet as pq  # not at the top: the command line answers before arrow has loaded

    schema = _parquet_schema()
    rows = iter(pairs)
    with written_whole(Path(path)) as partial, pq.ParquetWriter(partial, schema) as writer:
        while batch := [_parquet_row(pair) for pair in islice(rows, _PARQUET_ROWS)]:
            writer.write_batch(_record_batch(batch, schema))


def _plain_columns(pair: PreferencePair) -> dict[str, str | int | float]:
    unknown = sorted(set(pair.details) - set(DETAIL_COLUMNS))
    if unknown:
        raise InputError(
            f"{pair.name}: unknown details {', '.join(unknown)}; expected {', '.join(DETAIL_COLUMNS)}; rename them"
        )
    scores = {"chosen_score": pair.chosen_score, "rejected_score": pair.rejected_score}
    columns = {**scores, "source": pair.source or None, "seed": pair.seed, **pair.details}
    return {name: value for name, value in columns.items() if value is not None}


def _parquet_schema() -> "pa.Schema":
    import datasets  # not at the top: it takes most of a second to load

    text, number = datasets.Value("string"), datasets.Value("float64")
    features = {"prompt": text, "chosen": datasets.Image(), "rejected": datasets.Image()}
    features |= {"chosen_score": number, "rejected_score": number, "source": text, "seed": datasets.Value("int64")}
    types = {str: text, int: datasets.Value("int64"), float: number}
    features |= {column: types[NUMBERS.get(column, str)] for column in DETAIL_COLUMNS}
    return datasets.Features(features).arrow_schema


def _parquet_row(pair: PreferencePair) -> dict[str, object]:
    columns = _plain_columns(pair)
    details = {name: NUMBERS.get(name, str)(columns[name]) for name in pair.details if name in columns}
    images = {side: {"bytes": pair.encoded(side), "path": None} for side in SIDES}
    return {"prompt": pair.prompt, **columns, **images, **details}


def _record_batch(rows: list[dict[str, object]], schema: "pa.Schema") -> "pa.RecordBatch":
    import pyarrow as pa

    columns = [pa.array([row.get(field.name) for row in rows], type=field.type) for field in schema]
    return pa.RecordBatch.from_arrays(columns, schema=schema)
