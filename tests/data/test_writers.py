import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from operator import attrgetter

import datasets
import numpy as np
import pytest

from rpo.data.preference import PreferencePair
from rpo.data.readers import read_pairs
from rpo.data.writers import RecordFolder, write_pairs, write_parquet
from tests.data.samples import noise, pair, png

FULL = {"chosen_score": 0.9, "rejected_score": -0.25, "source": "test", "seed": 2**60 + 1}
DETAILS = {"critique": "the circle is blue", "prompt_id": "17"}


def same(read, written):
    fields = attrgetter("prompt", "chosen_score", "rejected_score", "source", "seed", "details", "key")
    return [fields(record) for record in read] == [fields(record) for record in written]


def test_a_folder_gives_back_what_was_written(tmp_path):
    pairs = [pair(0, **FULL, details=DETAILS), pair(1), pair(2, chosen_score=1.0), pair(3, chosen=png(6, form="JPEG"))]
    assert write_pairs(tmp_path, pairs) == 4
    read = read_pairs(tmp_path)
    assert same(read, pairs)
    assert [record.name for record in read] == [f"metadata.jsonl:{n}" for n in (1, 2, 3, 4)]
    assert read.ignored_columns == ()


def test_images_are_named_by_their_content_and_kept_once(tmp_path):
    write_pairs(tmp_path, [pair(0), pair(1, chosen=png(0)), pair(2, chosen=png(0, form="JPEG"))])
    files = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert len(files) == 5
    assert f"{pair(0).facts('chosen').digest}.png" in files
    assert sum(name.endswith(".jpeg") for name in files) == 1
    shared = tmp_path / "images" / f"{pair(0).facts('chosen').digest}.png"
    before = shared.stat()
    write_pairs(tmp_path, [pair(4, chosen=png(0))])
    assert (shared.stat().st_ino, shared.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_writing_again_adds_nothing_and_more_records_append(tmp_path):
    assert write_pairs(tmp_path, [pair(0), pair(1)]) == 2
    before = (tmp_path / "metadata.jsonl").read_bytes()
    assert write_pairs(tmp_path, [pair(0), pair(1)]) == 0
    assert (tmp_path / "metadata.jsonl").read_bytes() == before
    assert write_pairs(tmp_path, [pair(0), pair(2), pair(2)]) == 1
    assert [record.prompt for record in read_pairs(tmp_path)] == ["prompt 0", "prompt 1", "prompt 2"]


def test_a_torn_last_line_is_cut_off_before_appending(tmp_path):
    write_pairs(tmp_path, [pair(0)])
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write('{"prompt": "half')
    with pytest.raises(ValueError, match=r"^metadata\.jsonl:2: not JSON"):
        read_pairs(tmp_path)
    assert write_pairs(tmp_path, [pair(0), pair(1)]) == 1
    assert len(read_pairs(tmp_path)) == 2


KILLED = """
import sys
from rpo.data.writers import write_pairs
from tests.data.samples import pair
def endless():
    index = 0
    while True:
        yield pair(index)
        print(index, flush=True)
        index += 1
write_pairs(sys.argv[1], endless())
"""


def test_a_killed_writer_leaves_whole_records_and_is_continued(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    while int(process.stdout.readline()) < 20:
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    written = len(RecordFolder(tmp_path).metadata.read_text().splitlines())
    assert written >= 20
    assert write_pairs(tmp_path, [pair(i) for i in range(written + 5)]) == 5
    assert same(read_pairs(tmp_path), [pair(i) for i in range(written + 5)])


def test_stock_datasets_reads_the_folder_as_images(tmp_path):
    write_pairs(tmp_path / "pairs", [pair(0, **FULL), pair(1)])
    table = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "pairs"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert table[1]["prompt"] == "prompt 1"
    assert isinstance(table.features["chosen"], datasets.Image)
    assert np.array_equal(np.asarray(table[1]["rejected"]), np.asarray(noise(3)))


def test_parquet_gives_back_what_was_written(tmp_path):
    pairs = [pair(0, **FULL, details=DETAILS), pair(1), pair(2, chosen=png(4, form="JPEG"))]
    write_parquet(tmp_path / "pairs.parquet", pairs)
    read = read_pairs(tmp_path / "pairs.parquet", cache_dir=tmp_path / "cache")
    assert same(read, pairs)
    assert read[1].name == f"{tmp_path}/pairs.parquet row 1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "pairs.parquet"]


def test_stock_datasets_reads_the_parquet_with_images(tmp_path):
    write_parquet(tmp_path / "pairs.parquet", (pair(i) for i in range(300)))
    files = str(tmp_path / "pairs.parquet")
    table = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(table) == 300
    assert isinstance(table.features["chosen"], datasets.Image)
    assert np.array_equal(np.asarray(table[299]["chosen"]), np.asarray(noise(598)))


def test_a_parquet_that_cannot_be_finished_leaves_the_old_one(tmp_path):
    path = tmp_path / "pairs.parquet"
    write_parquet(path, [pair(0)])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="cannot be decoded|does not exist"):
        write_parquet(path, [pair(1), PreferencePair("p", tmp_path / "gone.png", png(1), name="x")])
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["pairs.parquet"]


def test_unknown_details_are_refused_before_anything_is_written(tmp_path):
    record = pair(0, details={"critic": "…"}, name="first")
    with pytest.raises(ValueError, match=r"^first: unknown details critic; expected prompt_id, critique, "):
        write_pairs(tmp_path, [record])
    assert list((tmp_path / "images").iterdir()) == []


def test_a_record_without_its_image_is_not_written(tmp_path):
    record = pair(0, rejected=tmp_path / "gone.png", name="first")
    with pytest.raises(ValueError, match=r"^first: the rejected image \(.*gone\.png\) does not exist"):
        write_pairs(tmp_path / "pairs", [pair(1), record])
    assert [record.prompt for record in read_pairs(tmp_path / "pairs")] == ["prompt 1"]


def test_lines_can_be_read_by_a_person(tmp_path):
    write_pairs(tmp_path, [pair(0, prompt="ein grüner Kreis", seed=3)])
    row = json.loads((tmp_path / "metadata.jsonl").read_text())
    assert list(row) == ["prompt", "chosen_file_name", "rejected_file_name", "seed", "key"]
    assert "grüner" in (tmp_path / "metadata.jsonl").read_text()
    assert time.time() - (tmp_path / row["chosen_file_name"]).stat().st_mtime < 60


@pytest.mark.parametrize("form", ["folder", "parquet"])
def test_the_image_that_a_pair_edits_is_kept(tmp_path, form):
    edited = [replace(pair(index), original=pair(index + 10).chosen) for index in range(3)]
    if form == "folder":
        write_pairs(tmp_path, edited)
        kept = read_pairs(tmp_path)
    else:
        write_parquet(tmp_path / "pairs.parquet", edited)
        kept = read_pairs(tmp_path / "pairs.parquet")
    assert [one.encoded("original") for one in kept] == [one.encoded("original") for one in edited]
    assert [one.key for one in kept] == [one.key for one in edited]
    assert kept[0].key != pair(0).key
    assert not kept.ignored_columns


def test_pairs_of_edits_and_others_in_one_folder(tmp_path):
    write_pairs(tmp_path, [pair(0), replace(pair(1), original=pair(2).chosen)])
    assert [one.original is None for one in read_pairs(tmp_path)] == [True, False]


def test_a_parquet_loses_no_original(tmp_path):
    plain, edit, path = pair(0), replace(pair(1), original=pair(2).chosen), tmp_path / "a.parquet"
    with pytest.raises(ValueError, match="the first record has no original, but others have"):
        write_parquet(path, [plain, edit])
    write_parquet(path, [edit, plain])
    assert [one.original is None for one in read_pairs(path)] == [False, True]
