"""Keeping preference records: an append-only folder that survives being killed, and parquet.

The folder holds `metadata.jsonl`, one record a line, and `images/`, files named by their content. Stock `datasets`
reads it as an image folder, a person reads it in a text editor. A record is there once its line is: images are put in
place first, each by an atomic rename, so that a line never names a file that is not whole. Images are kept byte by byte
as they came, which keeps their content hash and with it every cache entry.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from rpo.data.columns import DETAIL_COLUMNS, NUMBERS
from rpo.data.preference import SIDES, Picture, PreferencePair, Side
from rpo.errors import InputError
from rpo.files.whole import append_line, mend_last_line, read_lines, written_whole

if TYPE_CHECKING:
    import pyarrow as pa

# arrow and `datasets` are imported where they are used: the command line answers before they have loaded.

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
        """Keep one record: its images as they are encoded, then its line."""
        columns = _plain_columns(pair)
        files = {f"{one}_file_name": self._keep_image(pair, one) for one in pair.pictures}
        append_line(self.metadata, {"prompt": pair.prompt, **files, **columns, "key": pair.key})

    def _keep_image(self, pair: PreferencePair, side: Picture) -> str:
        digest, data = pair.facts(side).digest, pair.encoded(side)
        with Image.open(BytesIO(data)) as image:
            extension = (image.format or "png").lower()
        name = f"images/{digest}.{extension}"
        if not (self.folder / name).exists():
            with written_whole(self.folder / name) as partial:
                partial.write_bytes(data)
        return name


def write_pairs(folder: str | Path, pairs: Iterable[PreferencePair]) -> int:
    """Append records to a folder, which is made if need be, and say how many were new.

    One whose prompt and images are there already is not written again, so that an interrupted call can be repeated.
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


def _plain_columns(pair: PreferencePair) -> dict[str, str | int | float]:
    unknown = sorted(set(pair.details) - set(DETAIL_COLUMNS))
    if unknown:
        raise InputError(
            f"{pair.name}: unknown details {', '.join(unknown)}; expected {', '.join(DETAIL_COLUMNS)}; rename them"
        )
    scores = {"chosen_score": pair.chosen_score, "rejected_score": pair.rejected_score}
    columns = {**scores, "source": pair.source or None, "seed": pair.seed, **pair.details}
    return {name: value for name, value in columns.items() if value is not None}


def write_parquet(path: str | Path, pairs: Iterable[PreferencePair]) -> None:
    """Write records as one parquet file with `datasets` features: prompt, chosen and rejected (Image), and the rest.

    Edits have a column `original`, too, if the first record is one.
    """
    import datasets

    records = iter(pairs)
    first = next(records, None)
    text, number = datasets.Value("string"), datasets.Value("float64")
    features = {"prompt": text, "chosen": datasets.Image(), "rejected": datasets.Image()}
    features |= {} if first is None or first.original is None else {"original": datasets.Image()}
    features |= {"chosen_score": number, "rejected_score": number, "source": text, "seed": datasets.Value("int64")}
    types = {str: text, int: datasets.Value("int64"), float: number}
    features |= {column: types[NUMBERS.get(column, str)] for column in DETAIL_COLUMNS}
    every = records if first is None else chain([first], records)
    _write(path, datasets.Features(features).arrow_schema, every, _row)


def _row(pair: PreferencePair, number: int) -> dict[str, object]:
    columns = _plain_columns(pair)
    details = {name: NUMBERS.get(name, str)(columns[name]) for name in pair.details if name in columns}
    images = {one: {"bytes": pair.encoded(one), "path": None} for one in pair.pictures}
    return {"prompt": pair.prompt, **columns, **images, **details}


def write_pickapic(path: str | Path, pairs: Iterable[PreferencePair]) -> None:
    """Write records as one parquet file of Pick-a-Pic v2's columns, which other trainers read unchanged.

    Which side comes first is decided by a hash of the record, so that position tells nothing about preference, and
    writing again gives the same file. Images keep their encoding; the columns are called jpg_0 and jpg_1 whatever it
    is. Columns that only the site of Pick-a-Pic could fill (addresses, users, dates) are there and empty.
    """
    import pyarrow as pa

    types = {
        pa.string(): "best_image_uid caption image_0_uid image_0_url image_1_uid image_1_url model_0 model_1",
        pa.int64(): "ranking_id user_id num_example_per_prompt",
        pa.float64(): "label_0 label_1",
        pa.bool_(): "are_different has_label",
        pa.binary(): "jpg_0 jpg_1",
        pa.timestamp("ns"): "created_at",
    }
    type_of = {name: one for one, names in types.items() for name in names.split()}
    _write(path, pa.schema([(name, type_of[name]) for name in _PICKAPIC]), pairs, _pickapic_row)


_PICKAPIC = [
    "are_different",
    "best_image_uid",
    "caption",
    "created_at",
    "has_label",
    "image_0_uid",
    "image_0_url",
    "image_1_uid",
    "image_1_url",
    "jpg_0",
    "jpg_1",
    "label_0",
    "label_1",
    "model_0",
    "model_1",
    "ranking_id",
    "user_id",
    "num_example_per_prompt",
]


def _pickapic_row(pair: PreferencePair, number: int) -> dict[str, object]:
    row: dict[str, object] = {"caption": pair.prompt, "has_label": True, "ranking_id": number}
    for place, side in enumerate(side_order(pair)):
        model = pair.details.get("editor_model" if pair.details.get(f"{side}_is") == "edit" else "generator_model")
        row |= {
            f"image_{place}_uid": pair.facts(side).digest,
            f"jpg_{place}": pair.encoded(side),
            f"label_{place}": 1.0 if side == "chosen" else 0.0,
            f"model_{place}": None if model is None else str(model),
        }
    best = pair.facts("chosen").digest
    return row | {"are_different": best != pair.facts("rejected").digest, "best_image_uid": best}


def side_order(pair: PreferencePair) -> Sequence[Side]:
    """Which side comes first: as good as random, and always the same for the same record."""
    key = str(pair.details.get("record", pair.key))
    names = f"{key}/{pair.details.get('chosen_is', '')}/{pair.details.get('rejected_is', '')}"
    is_swapped = hashlib.sha256(f"side/{names}".encode()).digest()[0] & 1
    return SIDES[::-1] if is_swapped else SIDES


def _write(
    path: str | Path,
    schema: "pa.Schema",
    pairs: Iterable[PreferencePair],
    row_of: Callable[[PreferencePair, int], dict[str, object]],
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbered, known = enumerate(pairs), set(schema.names)
    with written_whole(Path(path)) as partial, pq.ParquetWriter(partial, schema) as writer:
        while rows := [row_of(pair, number) for number, pair in islice(numbered, _PARQUET_ROWS)]:
            if strangers := {name for row in rows for name in row if name not in known}:
                raise InputError(
                    f"{path}: the first record has no {', '.join(sorted(strangers))}, but others have; expected one "
                    "kind of records; write those with and without it apart"
                )
            columns = [pa.array([row.get(field.name) for row in rows], type=field.type) for field in schema]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
