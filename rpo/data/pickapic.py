"""Writing pairs with the columns of Pick-a-Pic v2, which the diffusers DPO script and other trainers read unchanged.

Which side comes first is decided by a hash of the record, so that position tells nothing about preference, and writing
again gives the same file. Images keep their encoding; the columns are called jpg_0 and jpg_1 whatever it is. Columns
that only the site of Pick-a-Pic could fill (addresses, users, dates) are there and empty.
"""

import hashlib
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from rpo.data.preference import SIDES, PreferencePair, Side
from rpo.files import written_whole

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS = 256  # in memory at a time


def write_pickapic(path: str | Path, pairs: Iterable[PreferencePair]) -> None:
    """Write records as one parquet file of Pick-a-Pic's columns."""
    import pyarrow as pa  # not at the top: the command line answers before arrow has loaded
    import pyarrow.parquet as pq

    schema = _schema()
    rows = iter(enumerate(pairs))
    with written_whole(Path(path)) as partial, pq.ParquetWriter(partial, schema) as writer:
        while batch := [pickapic_row(pair, number) for number, pair in islice(rows, _ROWS)]:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))


def pickapic_row(pair: PreferencePair, number: int) -> dict[str, object]:
    """The values of one row; columns that are left out are empty."""
    sides = side_order(pair)
    uids = [pair.facts(side).digest for side in sides]
    labels = [1.0 if side == "chosen" else 0.0 for side in sides]
    models = [_model_of(pair, side) for side in sides]
    return {
        "are_different": uids[0] != uids[1],
        "best_image_uid": pair.facts("chosen").digest,
        "caption": pair.prompt,
        "has_label": True,
        "image_0_uid": uids[0],
        "image_1_uid": uids[1],
        "jpg_0": pair.encoded(sides[0]),
        "jpg_1": pair.encoded(sides[1]),
        "label_0": labels[0],
        "label_1": labels[1],
        "model_0": models[0],
        "model_1": models[1],
        "ranking_id": number,
    }


def side_order(pair: PreferencePair) -> Sequence[Side]:
    """Which side comes first: as good as random, and always the same for the same record."""
    key = str(pair.details.get("record", pair.key))
    names = f"{key}/{pair.details.get('chosen_is', '')}/{pair.details.get('rejected_is', '')}"
    is_swapped = hashlib.sha256(f"side/{names}".encode()).digest()[0] & 1
    return SIDES[::-1] if is_swapped else SIDES


def _model_of(pair: PreferencePair, side: Side) -> str | None:
    column = "editor_model" if pair.details.get(f"{side}_is") == "edit" else "generator_model"
    model = pair.details.get(column)
    return None if model is None else str(model)


def _schema() -> "pa.Schema":
    import pyarrow as pa

    text, number, data = pa.string(), pa.int64(), pa.binary()
    return pa.schema(
        [
            ("are_different", pa.bool_()),
            ("best_image_uid", text),
            ("caption", text),
            ("created_at", pa.timestamp("ns")),
            ("has_label", pa.bool_()),
            ("image_0_uid", text),
            ("image_0_url", text),
            ("image_1_uid", text),
            ("image_1_url", text),
            ("jpg_0", data),
            ("jpg_1", data),
            ("label_0", pa.float64()),
            ("label_1", pa.float64()),
            ("model_0", text),
            ("model_1", text),
            ("ranking_id", number),
            ("user_id", number),
            ("num_example_per_prompt", number),
        ]
    )
