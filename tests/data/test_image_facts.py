"""An image that has not changed is not read again to be known; one that has is."""

import io
import json
import os
import sqlite3

import datasets
import pyarrow.parquet
import pytest
from PIL import Image

from rpo.data.image_facts import facts_file
from rpo.data.preference import SIDES, PreferencePair, pair_set, pairs_identity
from rpo.data.readers import read_pairs
from rpo.data.tables import Cell
from tests.opens import opened_images

NAMES = [f"{index}-{side}.png" for index in range(3) for side in ("chosen", "rejected")]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A file of facts of the test's own, and files that nobody has touched for long."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "known"))
    monkeypatch.setattr("rpo.data.image_facts.SETTLED_SECONDS", -60.0)
    return tmp_path / "known"


def png(colour, size=(8, 6)):
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, format="PNG")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Three pairs in files."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for index, name in enumerate(NAMES):
        (folder / name).write_bytes(png((index, 7, 9)))
    rows = [
        {"prompt": f"p{i}", "chosen_file_name": NAMES[2 * i], "rejected_file_name": NAMES[2 * i + 1]} for i in range(3)
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def started(folder):
    """The images that a start opens, and what they are."""
    with opened_images(folder) as names:
        pairs = read_pairs(folder)
        found = pairs_identity(pairs)
    return names, found


def test_the_second_start_opens_no_image(folder, cache):
    first = started(folder)
    assert first[0] == NAMES
    before = facts_file().read_bytes()
    assert facts_file().parent == cache
    assert started(folder) == ([], first[1])
    assert facts_file().read_bytes() == before
    facts_file().unlink()
    assert started(folder) == first
    assert read_pairs(folder)[1].facts("rejected") == PreferencePair("", b"", png((3, 7, 9))).facts("rejected")


def grown(path):
    path.write_bytes(path.read_bytes() + b"more")


def dated(path):
    os.utime(path, ns=(1, 1))


def changed_within(path):
    content, times = path.read_bytes(), os.stat(path)
    path.write_bytes(content[:-1] + b"x")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def replaced(path):
    times = os.stat(path)
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[:-1] + b"y")
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("change", [grown, dated, changed_within, replaced])
def test_what_changed_is_read_again_and_nothing_else(folder, change):
    first = started(folder)
    change(folder / NAMES[3])
    names, found = started(folder)
    assert names == [NAMES[3]]
    changed = {name for name in found if found[name] != first[1][name]}
    assert changed == (set() if change is dated else {"rejected images"})
    assert started(folder) == ([], found)


def test_files_that_change_places_are_told_apart(folder):
    first = started(folder)
    (folder / NAMES[0]).rename(folder / "aside")
    (folder / NAMES[2]).rename(folder / NAMES[0])
    (folder / "aside").rename(folder / NAMES[2])
    assert started(folder)[1]["chosen images"] != first[1]["chosen images"]


def test_what_was_written_just_now_is_not_kept(folder, monkeypatch):
    monkeypatch.setattr("rpo.data.image_facts.SETTLED_SECONDS", 1000.0)
    assert started(folder)[0] == started(folder)[0] == NAMES
    assert not facts_file().exists()


def test_pairs_of_two_sizes_are_opened_when_they_are_used(folder):
    with opened_images(folder) as names:
        pairs = read_pairs(folder, allow_size_mismatch=True)
    assert names == []
    pairs_identity(pairs)
    assert started(folder)[0] == []


def test_a_faulty_record_is_named_and_the_others_are_kept(folder):
    (folder / NAMES[3]).write_text("no image")
    for expected in (NAMES, NAMES[3:4]):
        with opened_images(folder) as names, pytest.raises(ValueError, match=r"metadata\.jsonl:2: the rejected image"):
            read_pairs(folder)
        assert names == expected


def test_many_pairs_of_few_images(folder):
    files = [folder / name for name in NAMES[:2]]
    pairs = [PreferencePair(f"p{index}", *files) for index in range(1000)]
    pair_set(pairs[:1])
    with opened_images(folder) as names:
        found = pair_set(pairs)
    assert names == [] and len({pair.key for pair in found}) == 1000


def saved_table(tmp_path, cells):
    features = {"prompt": datasets.Value("string"), "chosen": datasets.Image(), "rejected": datasets.Image()}
    rows = [{"prompt": "p", "chosen": chosen, "rejected": rejected} for chosen, rejected in cells]
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(tmp_path / "pairs.parquet")
    return tmp_path / "pairs.parquet"


def read_from(path, monkeypatch):
    """Rows of the cells that a start reads, and what they are."""
    read, call = [], Cell.__call__
    with monkeypatch.context() as patch:
        patch.setattr(Cell, "__call__", lambda cell: read.append(cell.index) or call(cell))
        pairs = read_pairs(path, cache_dir=path.parent / "converted")
        return read, pairs_identity(pairs)


def test_cells_that_hold_images(tmp_path, monkeypatch):
    cells = [({"bytes": png((1, index, 0))}, {"bytes": png((2, index, 0))}) for index in range(3)]
    first = read_from(saved_table(tmp_path, cells), monkeypatch)
    assert sorted(first[0]) == [0, 0, 1, 1, 2, 2]
    assert read_from(tmp_path / "pairs.parquet", monkeypatch) == ([], first[1])
    cells[1] = ({"bytes": png((9, 9, 9))}, cells[1][1])
    second = read_from(saved_table(tmp_path, cells), monkeypatch)
    assert {name for name in first[1] if first[1][name] != second[1][name]} == {"chosen images"}


def test_cells_that_name_files(folder, monkeypatch):
    table = folder / "pairs.parquet"
    columns = {side: [{"path": name, "bytes": None} for name in NAMES if side in name] for side in SIDES}
    cell = pyarrow.struct({"path": pyarrow.string(), "bytes": pyarrow.binary()})
    arrays = {side: pyarrow.array(cells, cell) for side, cells in columns.items()}
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["p"] * 3, **arrays}), table)
    (folder / "metadata.jsonl").unlink()
    first = read_from(table, monkeypatch)
    assert len(first[0]) == 6
    assert read_from(table, monkeypatch) == ([], first[1])
    grown(folder / NAMES[2])
    assert read_from(table, monkeypatch)[0] == [1]


def test_what_is_in_memory_is_left_alone():
    pairs = pair_set([PreferencePair("p", png((1, 2, 3)), png((3, 2, 1)))])
    table = datasets.Dataset.from_dict({"prompt": ["p"], "chosen": [png((1, 1, 1))], "rejected": [png((2, 2, 2))]})
    assert len(pairs) == len(read_pairs(table)) == 1
    assert not facts_file().exists()


def test_a_damaged_file_is_named(folder, cache):
    cache.mkdir()
    facts_file().write_bytes(b"no database" * 100)
    with pytest.raises(ValueError, match=r"rpo_images\.sqlite is damaged .*; delete it"):
        read_pairs(folder)


def test_a_cache_that_cannot_be_written_costs_time_and_is_told(folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match="cannot be used .* every start reads all images"):
        assert started(folder)[0] == NAMES


def test_a_file_of_another_layout_is_not_misread(folder, cache):
    cache.mkdir()
    with sqlite3.connect(facts_file()) as connection:
        connection.execute("CREATE TABLE facts (key BLOB, wrong TEXT)")
    with pytest.warns(UserWarning, match="cannot be used"):
        assert len(read_pairs(folder)) == 3
