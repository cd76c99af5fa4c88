"""A shard in memory and as a file, on any place that fsspec knows; and a set of many numbers."""

import hashlib
import json
import tracemalloc

import numpy as np
import pytest

from rpo.curation.store.address import Store
from rpo.curation.store.keys import Keys, key_of
from rpo.curation.store.mark import STAGES, ShardMark, Tally, read_mark, read_marks
from rpo.curation.store.run import CurationRun
from rpo.curation.store.shard import load, opened, read, read_images, seal
from rpo.curation.worker import tally_of
from rpo.data.pixels import decode_image
from tests.curation.fakes import picture
from tests.curation.store.samples import made, shard

HASHES = {stage: stage[0] * 64 for stage in STAGES}


@pytest.fixture(params=["folder", "file", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def store(request, tmp_path):
    place = {"folder": str(tmp_path / "run"), "file": f"file://{tmp_path}/run", "memory": f"memory://{tmp_path}/run"}
    if request.param == "s3":
        place["s3"] = f"{request.getfixturevalue('bucket')}{tmp_path}/run"
    return Store(place[request.param])


def sealed(store, found):
    return seal(store, found, HASHES, tally_of(found))


@pytest.mark.parametrize("num_stages", range(1, 7))
def test_a_shard_comes_back_as_it_was(store, num_stages):
    found = shard(7, 40, ["a", "b", "c"], num_stages)
    mark = sealed(store, found)
    back = load(store, mark, num_stages)
    assert (back.number, back.start, back.ids, back.num_through) == (7, 40, ("a", "b", "c"), num_stages)
    assert back.rows == found.rows and back.images == found.images and back.plan == mark.plan
    without = read(opened(store, mark.file), mark)
    assert without.rows == found.rows and without.images == {}
    assert read_images(opened(store, mark.file), 0) == found.images
    assert list(read_marks(store)) == [mark]


def test_images_are_named_by_content_and_come_back():
    found = shard(0, 0, ["a"])
    digest = found.save_image(picture(5))
    assert digest == hashlib.sha256(found.images[digest]).hexdigest() == found.save_image(picture(5))
    assert np.array_equal(np.asarray(found.load_image(digest, "a")), np.asarray(picture(5)))


def test_what_came_of_later_stages_is_forgotten(store):
    mark = sealed(store, shard(0, 0, ["a", "b"]))
    back = load(store, mark, 2)
    assert back.rows["critiques"] and not back.rows["edits"] and back.num_through == 2
    assert back.images.keys() == {row["image"] for row in back.rows["sources"].values()}


def test_the_same_shard_is_the_same_file_and_another_takes_its_place(store):
    found = shard(3, 0, ["a", "b"], 2)
    first = sealed(store, found)
    assert sealed(store, shard(3, 0, ["a", "b"], 2)).file == first.file
    whole = shard(3, 0, ["a", "b"])
    whole.mark = first
    second = sealed(store, whole)
    assert store.names("shards") == [second.file.partition("/")[2], "0000003.json"] != [first.file, "0000003.json"]
    assert hashlib.sha256(store.read(second.file)).hexdigest() == second.sha256


def test_a_shard_counts_as_far_as_it_was_made_as_the_run_says():
    mark = ShardMark(0, 0, 1, "", "", "", {stage: HASHES[stage] for stage in STAGES[:4]}, Tally())
    assert mark.num_stages(HASHES) == 4
    assert mark.num_stages(HASHES | {"critiques": "other"}) == 1
    assert mark.num_stages({}) == 0


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"number": 1}', b"null"])
def test_half_a_mark_is_none(store, data):
    assert read_mark(data) is None
    sealed(store, shard(0, 0, ["a"]))
    store.write("shards/0000001.json", data)
    assert [mark.number for mark in read_marks(store)] == [0]


def test_a_damaged_file_is_told(store):
    mark = sealed(store, shard(0, 0, ["a"]))
    store.write(mark.file, store.read(mark.file)[:-1])
    with pytest.raises(ValueError, match=r"0000000.* is not what its mark says; .* delete .*0000000\.json"):
        load(store, mark, 6)
    store.remove(mark.file)
    with pytest.raises(ValueError, match="does not exist, or is not what its mark says"):
        load(store, mark, 6)
    with pytest.raises(ValueError, match="does not exist; expected every shard that has a mark"):
        opened(store, mark.file)


def test_datasets_reads_the_files_with_images(tmp_path):
    import datasets

    made(tmp_path / "run", [shard(0, 0, ["a", "b"]), shard(1, 2, ["c"], 2)])
    files = str(tmp_path / "run" / "shards" / "*.parquet")
    table = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert table["record"] == ["a", "b", "c"] and table["order"] == [0, 1, 2]
    assert [image.size for image in table["source_image"]] == [(12, 10)] * 3
    assert [len(images) for images in table["edited_images"]] == [2, 2, 0]
    assert json.loads(table[1]["decisions"])["outcomes"][0]["chosen"] == "b/edit" and table[2]["decisions"] is None


def test_an_image_of_a_run_is_found_by_its_place(tmp_path):
    made(tmp_path, [shard(0, 0, [f"{k:02}" for k in range(40)]), shard(1, 40, ["x"])])
    run = CurationRun(tmp_path)
    for found in run.shards():
        for record in found.ids:
            row = found.rows["sources"][record]
            data = run.image_bytes(row["image"], row["order"], record)
            assert decode_image(data, "").image == picture(row["order"])
    with pytest.raises(ValueError, match=r"^record x: the image 00 is not in .*0000001"):
        run.image_bytes("00", 40, "record x")


def test_files_of_a_store(store):
    store.write("a/b.json", b"1")
    store.write("a/b.json", b"2")
    store.write("a/c/d.json", b"3")
    assert store.read("a/b.json") == b"2" and store.names("a") == ["b.json", "c"] and store.names("none") == []
    assert store.read_all(["a/b.json", "a/none", "a/c/d.json"]) == {"a/b.json": b"2", "a/c/d.json": b"3"}
    with pytest.raises(FileNotFoundError):
        store.read("a/none")
    store.remove("a/none")
    store.remove("a/b.json")
    store.remove_if_empty("a/c")
    assert store.names("a") == ["c"]
    store.remove("a/c/d.json")
    for folder in ("a/c", "a/none"):
        store.remove_if_empty(folder)
    assert store.names("a") == [] or store.folder is None
    assert store.place("x") == f"{store.address}/x"


def test_an_address_that_nothing_knows_is_told():
    with pytest.raises(ValueError, match="nowhere://x cannot be used as the place of a run"):
        Store("nowhere://x")


def test_numbers_that_are_added_are_known_again(monkeypatch):
    monkeypatch.setattr("rpo.curation.store.keys._FEW", 10)
    keys, expected = Keys(), set()
    for number in np.random.default_rng(0).integers(0, 2**63, 500).tolist():
        number = 2 * number % 300
        assert keys.add(number) == (number not in expected)
        expected.add(number)
        assert len(keys) == len(expected)
    assert not keys.add(min(expected)) and keys.add(2**64 - 1)
    assert 0 <= key_of("a") < 2**64 and key_of("a") != key_of("b")


def test_a_number_takes_few_bytes(monkeypatch):
    monkeypatch.setattr("rpo.curation.store.keys._FEW", 500)
    tracemalloc.start()
    keys = Keys()
    for number in range(20_000):
        keys.add(number * 0x9E3779B97F4A7C15 % 2**64)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(keys) == 20_000 and held < 20 * 20_000
