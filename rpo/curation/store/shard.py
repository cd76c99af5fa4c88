"""A shard: some hundred records that are done, kept and lost together; in memory while a worker has it, else a file.

    shards/0000017.<hash>.parquet    a row per record: caption, source and edits as images, what each stage said as JSON
    shards/0000017.json              its mark: the file's name and sha256, what made each stage, and what came of it

The file comes first, named by its content, and the mark second: a shard is done when its mark is there. So a worker may
be killed at any moment, and two that do the same shard do no harm. Any version of `datasets` opens the files, too.
"""

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, final

import numpy as np
from PIL.Image import Image

from rpo.curation.store.address import Store
from rpo.curation.store.mark import FOLDER, STAGES, ShardMark, StageName, Tally
from rpo.data.pixels import decode_image
from rpo.data.preference import encode_png
from rpo.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

# arrow is imported where it is used: the command line answers before it has loaded.

Row = Mapping[str, Any]
"""What a stage says of a record, as JSON takes it: a result, or {"fault": …}."""

ROWS_AT_ONCE = 16
"""Records whose images are read together: a row group."""

_TEXTS = ("record", "caption", "group", "side")
_IMAGES = ("source_image", "edited_images")


@final
class Shard:
    """Records in work.

    Attributes:
        number: Which shard of the run it is.
        start: Place of its first record in the plan.
        ids: Its records, in the order of the plan.
        planned: What is planned of each record.
        rows: What each stage has said of its records so far.
        images: Encoded images, by their sha256.
        num_through: How many of the stages all records are through with.
        num_sealed: How many of these are sealed.
        mark: Of what was sealed last.
    """

    def __init__(self, number: int, start: int, ids: Sequence[str], planned: Mapping[str, Any] | None = None) -> None:
        """Begin with nothing done."""
        self.number, self.start, self.ids, self.planned = number, start, tuple(ids), planned or {}
        self.rows: dict[StageName, dict[str, Row]] = {stage: {} for stage in STAGES}
        self.images: dict[str, bytes] = {}
        self.num_through = self.num_sealed = 0
        self.mark: ShardMark | None = None
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """What it is called, in messages and among the answers."""
        return f"{self.number:07}"

    @property
    def plan(self) -> str:
        """sha256 of its records' ids."""
        return plan_of(self.ids)

    def place_of(self, record: str) -> int:
        """The place of a record in the plan."""
        return self.start + self.ids.index(record)

    def together_with(self, record: str) -> list[str]:
        """The records that are decided together with one, itself among them."""
        sources = self.rows["sources"]
        return [one for one in self.ids if sources[one]["group"] == sources[record]["group"]]

    def record(self, stage: StageName, record: str, row: Row) -> None:
        """Keep what a stage says of a record; may be called by several threads."""
        with self._lock:
            self.rows[stage][record] = row

    def save_image(self, image: Image) -> str:
        """Keep an RGB image, and return the sha256 that it is called by."""
        data = encode_png(np.asarray(image))
        digest = hashlib.sha256(data).hexdigest()
        self.images[digest] = data
        return digest

    def load_image(self, digest: str, record: str) -> Image:
        """The pixels of an image."""
        return decode_image(self.images[digest], f"{record}: the image {digest}").image

    def took(self, stage: StageName, seconds: float) -> None:
        """Count the seconds of a stage."""
        with self._lock:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def forget(self, num_stages: int) -> None:
        """Leave only what the first stages have said."""
        for stage in STAGES[num_stages:]:
            self.rows[stage] = {}
            self.seconds.pop(stage, None)
        self.num_through = num_stages
        named = {str(row["image"]) for row in self.rows["sources"].values()}
        for row in self.rows["edits"].values():
            named.update(digests_of(row))
        self.images = {digest: data for digest, data in self.images.items() if digest in named}


def plan_of(ids: Sequence[str]) -> str:
    """What tells the records of one shard from those of another."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


def digests_of(edit: Row) -> list[str]:
    """The images that a row of the edits names."""
    return [edit["image"], *edit.get("others", ())] if "image" in edit else []


def seal(store: Store, shard: Shard, made_by: Mapping[StageName, str], tally: Tally) -> ShardMark:
    """Write what a shard has come to, as far as whole stages go, and mark it; what was sealed of it before is gone."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pictures = dict.fromkeys(("source_image.bytes", "edited_images.list.element.bytes"), "none")
    table = _table(shard)
    packed = {column: "zstd" for column in _leaves(table.schema)} | pictures
    # Least and greatest texts of every 16 rows would be most of the file, and nobody asks for them.
    pq.write_table(table, sink, row_group_size=ROWS_AT_ONCE, compression=packed, write_statistics=False)
    data = sink.getvalue().to_pybytes()
    digest = hashlib.sha256(data).hexdigest()
    file = f"{FOLDER}/{shard.name}.{digest[:16]}.parquet"
    stages: dict[StageName, str] = {stage: made_by[stage] for stage in STAGES[: shard.num_through]}
    mark = ShardMark(shard.number, shard.start, len(shard.ids), shard.plan, file, digest, stages, tally)
    store.write(file, data)
    store.write(mark.name, (json.dumps(asdict(mark)) + "\n").encode())
    if shard.mark is not None and shard.mark.file != file:
        store.remove(shard.mark.file)
    shard.mark, shard.num_sealed = mark, shard.num_through
    return mark


def load(store: Store, mark: ShardMark, num_stages: int) -> Shard:
    """A sealed shard to go on with, after so many of its stages."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        data = store.read(mark.file)
    except FileNotFoundError:
        data = b""
    if hashlib.sha256(data).hexdigest() != mark.sha256:
        raise InputError(
            f"{store.place(mark.file)} {'is not' if data else 'does not exist, or is not'} what its mark says; "
            f"expected the sha256 {mark.sha256}; restore it, or delete {store.place(mark.name)} and run again with "
            "--resume: this shard is then done again, and nobody is asked twice whose answers are kept"
        )
    shard = _rows(pq.read_table(pa.BufferReader(data)), mark)
    shard.num_sealed = num_stages
    shard.seconds = dict(mark.tally.seconds)
    shard.forget(num_stages)
    return shard


def opened(store: Store, file: str) -> "pq.ParquetFile":
    """The file of a sealed shard, to read parts of."""
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(store.reader(file))
    except FileNotFoundError as error:
        raise InputError(
            f"{store.place(file)} does not exist; expected every shard that has a mark; restore it, or delete its mark "
            "beside it and run again with --resume: this shard is then done again"
        ) from error


def read(file: "pq.ParquetFile", mark: ShardMark) -> Shard:
    """A sealed shard without its images."""
    return _rows(file.read(columns=[*_TEXTS, "order", *_EXTRAS, *STAGES[1:]]), mark)


def read_images(file: "pq.ParquetFile", group: int) -> dict[str, bytes]:
    """The images of `ROWS_AT_ONCE` records of a sealed shard, by their sha256."""
    return _pictures(file.read_row_group(group, columns=list(_IMAGES)))


_EXTRAS = ("origin", "image", "look")


def _table(shard: Shard) -> "pa.Table":
    import pyarrow as pa

    sources = [shard.rows["sources"][record] for record in shard.ids]
    edits = [shard.rows["edits"].get(record, {}) for record in shard.ids]
    num_through = shard.num_through
    columns: dict[str, list[Any]] = {
        "record": list(shard.ids),
        "order": [row["order"] for row in sources],
        **{name: [row[name] for row in sources] for name in ("caption", "group", "side", "image")},
        "look": [int(row["look"], 16) for row in sources],
        "origin": [_json(row["origin"]) for row in sources],
        "source_image": [_image(shard, row["image"]) for row in sources],
        "edited_images": [[_image(shard, digest) for digest in digests_of(row)] for row in edits],
        **{
            stage: [_json(shard.rows[stage].get(record)) for record in shard.ids]
            if number < num_through
            else [None] * len(shard.ids)
            for number, stage in enumerate(STAGES[1:], start=1)
        },
    }
    if num_through <= STAGES.index("edits"):
        columns["edited_images"] = [[] for _ in shard.ids]
    schema = _schema()
    return pa.Table.from_arrays([pa.array(columns[one.name], type=one.type) for one in schema], schema=schema)


def _schema() -> "pa.Schema":
    """Columns, with the note from which `datasets` knows that images are images."""
    import pyarrow as pa

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    texts = (*_TEXTS, "image", "origin", *STAGES[1:])
    kinds: dict[str, Any] = {name: pa.string() for name in texts}
    kinds |= {"order": pa.int64(), "look": pa.uint64()}
    kinds |= {"source_image": image, "edited_images": pa.list_(image)}
    order = ["record", "order", "caption", "source_image", "edited_images", *STAGES[1:], "group", "side", "origin"]
    order += ["image", "look"]
    plain = {pa.string(): "string", pa.int64(): "int64", pa.uint64(): "uint64"}
    features: dict[str, Any] = {
        name: {"dtype": plain[kinds[name]], "_type": "Value"} for name in order if name not in _IMAGES
    }
    features |= {"source_image": {"_type": "Image"}, "edited_images": {"feature": {"_type": "Image"}, "_type": "List"}}
    note = json.dumps({"info": {"features": {name: features[name] for name in order}}})
    return pa.schema([(name, kinds[name]) for name in order], metadata={"huggingface": note})


def _leaves(schema: "pa.Schema") -> list[str]:
    """The columns of a file, by their paths."""
    inner = {"source_image": "source_image.{}", "edited_images": "edited_images.list.element.{}"}
    return [
        path
        for name in schema.names
        for path in ([inner[name].format(part) for part in ("bytes", "path")] if name in inner else [name])
    ]


def _image(shard: Shard, digest: str) -> dict[str, Any]:
    return {"bytes": shard.images[digest], "path": f"{digest}.png"}


def _json(value: Row | None) -> str | None:
    return None if value is None else _to_json(value)


_to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def _rows(table: "pa.Table", mark: ShardMark) -> Shard:
    names = [name for name in table.column_names if name not in _IMAGES]
    found = table.select(names).to_pylist()
    shard = Shard(mark.number, mark.start, [row["record"] for row in found])
    for row in found:
        source = {name: row[name] for name in ("caption", "image", "order", "group", "side")}
        source |= {"origin": json.loads(row["origin"]), "look": f"{row['look']:016x}"}
        shard.rows["sources"][row["record"]] = source
        for stage in STAGES[1:]:
            if row[stage] is not None:
                shard.rows[stage][row["record"]] = json.loads(row[stage])
    shard.num_through, shard.mark = len(mark.stages), mark
    if _IMAGES[0] in table.column_names:
        shard.images = _pictures(table)
    return shard


def _pictures(table: "pa.Table") -> dict[str, bytes]:
    cells = [*table.column("source_image").to_pylist()]
    cells += [cell for some in table.column("edited_images").to_pylist() for cell in some]
    return {cell["path"].removesuffix(".png"): cell["bytes"] for cell in cells}
