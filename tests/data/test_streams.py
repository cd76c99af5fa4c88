import json

import datasets
import pytest

import rpo.data.readers
from rpo.data.readers import read_pairs
from rpo.data.writers import write_pairs
from tests.data.samples import png

LABELS = [1.0, 0.5, 0.0, 1.0, 0.5, 1.0]


@pytest.fixture
def source(tmp_path):
    return table(tmp_path / "set")


def table(folder, labels=LABELS, **columns):
    folder.mkdir(exist_ok=True)
    count = len(labels)
    rows = {
        "caption": [f"prompt {i}" for i in range(count)],
        "jpg_0": [png(2 * i) for i in range(count)],
        "jpg_1": [png(2 * i + 1) for i in range(count)],
        "label_0": labels,
        "image_0_uid": list(range(count)),
    } | columns
    datasets.Dataset.from_dict(rows).to_parquet(folder / "part.parquet")
    return folder


def stream(source, limit, **options):
    return read_pairs(source, streaming=True, limit=limit, cache_dir=source.parent / "cache", **options)


def folders(source):
    return sorted(path for path in (source.parent / "cache").iterdir() if (path / "metadata.jsonl").exists())


def test_streaming_gives_what_reading_gives(source):
    streamed = stream(source, 6)
    whole = read_pairs(source, cache_dir=source.parent / "cache")
    assert [record.key for record in streamed] == [record.key for record in whole]
    assert streamed.dropped == whole.dropped == {"tie": 2}
    assert streamed.ignored_columns == whole.ignored_columns == ("image_0_uid",)
    assert [record.details["source_row"] for record in streamed] == [0, 2, 3, 5]


def test_a_later_call_goes_on_and_a_smaller_limit_reads_less(source, monkeypatch):
    kept = []
    keep = rpo.data.readers._keep
    monkeypatch.setattr(rpo.data.readers, "_keep", lambda *args: (kept.append(args[-1]), keep(*args))[1])
    assert [record.prompt for record in stream(source, 3)] == ["prompt 0", "prompt 2"]
    assert kept == [0, 1, 2]
    assert len(stream(source, 6)) == 4
    assert kept == [0, 1, 2, 3, 4, 5]
    smaller = stream(source, 2)
    assert [record.prompt for record in smaller] == ["prompt 0"]
    assert smaller.dropped == {"tie": 1}
    assert kept == [0, 1, 2, 3, 4, 5]
    assert len(folders(source)) == 1


def test_an_interrupted_stream_is_continued(source, monkeypatch):
    keep = rpo.data.readers._keep

    def breaks(*args):
        if args[-1] == 3:
            raise ConnectionError("gone")
        return keep(*args)

    monkeypatch.setattr(rpo.data.readers, "_keep", breaks)
    with pytest.raises(ConnectionError):
        stream(source, 6)
    monkeypatch.setattr(rpo.data.readers, "_keep", keep)
    (folder,) = folders(source)
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"prompt": "half a li')
    with (folder / "left_out.jsonl").open("a") as file:
        file.write('{"source_row": 4, "rea')
    streamed = stream(source, 6)
    assert [record.details["source_row"] for record in streamed] == [0, 2, 3, 5]
    assert [json.loads(line)["source_row"] for line in (folder / "left_out.jsonl").read_text().splitlines()] == [1, 4]


def test_a_changed_source_begins_a_new_folder(source):
    assert [record.prompt for record in stream(source, 1)] == ["prompt 0"]
    table(source, labels=[0.0, 1.0], caption=["new 0", "new 1"])
    streamed = stream(source, 1)
    assert [record.prompt for record in streamed] == ["new 0"]
    assert streamed[0].encoded("chosen") == png(1)
    assert len(folders(source)) == 2


def test_faulty_rows_are_named_kept_count_of_and_can_be_skipped(tmp_path):
    source = table(tmp_path / "set", labels=[1.0, 1.0, 0.3], jpg_0=[png(0), b"junk", png(4)])
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"^{source} row 1: the chosen image .* cannot be decoded .*and 1 more"):
            stream(source, 3)
    streamed = stream(source, 3, skip_faulty=True)
    assert [record.prompt for record in streamed] == ["prompt 0"]
    assert streamed.dropped == {"faulty": 2}


def test_streaming_needs_a_limit(source):
    with pytest.raises(ValueError) as error:
        stream(source, None)
    assert str(error.value) == (
        f"{source}: read row by row without a limit; expected the number of rows to keep; give limit=…"
    )


def test_what_is_on_this_disk_is_not_streamed(tmp_path):
    write_pairs(tmp_path / "folder", read_pairs(table(tmp_path / "set"), cache_dir=tmp_path / "cache"))
    with pytest.raises(ValueError) as error:
        read_pairs(tmp_path / "folder", streaming=True, limit=2)
    assert str(error.value) == (
        f"{tmp_path}/folder/metadata.jsonl is on this disk already; expected a remote source; do not stream it"
    )
    datasets.Dataset.from_dict({"prompt": ["a"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="expected a remote one; do not stream it"):
        read_pairs(tmp_path / "saved", streaming=True, limit=2)


def test_the_copy_is_a_folder_of_records(source):
    stream(source, 6)
    assert len(read_pairs(*folders(source))) == 4
