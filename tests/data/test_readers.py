import json
import pickle
import subprocess
import sys

import datasets
import numpy as np
import pytest

from rpo.data.preference import PreferencePair
from rpo.data.readers import read_pairs, scan
from rpo.data.tables import Home, encoded_bytes
from rpo.data.writers import write_pairs, write_parquet
from rpo.errors import InputError
from tests.data.samples import noise, pair, png, write_file


def jsonl(folder, *rows):
    for seed in range(4):
        write_file(folder / "img" / f"{seed}.png", png(seed))
    text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    return write_file(folder / "metadata.jsonl", text.encode())


def row(**columns):
    return {"prompt": "p", "chosen": "img/0.png", "rejected": "img/1.png"} | columns


def pickapic(labels, **columns):
    count = len(labels)
    return {
        "caption": [f"prompt {i}" for i in range(count)],
        "jpg_0": [png(2 * i, form="JPEG") for i in range(count)],
        "jpg_1": [png(2 * i + 1, form="JPEG") for i in range(count)],
        "label_0": labels,
        "image_0_uid": [str(i) for i in range(count)],
    } | columns


def parquet(folder, columns, features=None):
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "part.parquet")
    return folder / "part.parquet"


def shows(record, side, seed, form="PNG"):
    return record.encoded(side) == png(seed, form=form)


@pytest.mark.parametrize("columns", [("chosen", "rejected"), ("chosen_file_name", "rejected_file_name")])
def test_metadata_with_paths(tmp_path, columns):
    files = dict(zip(columns, ("img/2.png", "img/3.png"), strict=True))
    jsonl(tmp_path, {"prompt": "a", **files, "chosen_score": 1, "seed": 4, "mood": "good"})
    for source in (tmp_path, str(tmp_path), tmp_path / "metadata.jsonl"):
        (record,) = read_pairs(source)
        assert shows(record, "chosen", 2)
        assert shows(record, "rejected", 3)
        assert (record.chosen_score, record.seed, record.name) == (1.0, 4, "metadata.jsonl:1")
    assert read_pairs(tmp_path).ignored_columns == ("mood",)


def test_parquet_with_image_columns(tmp_path):
    images = [noise(0), noise(2)], [noise(1), noise(3)]
    path = parquet(tmp_path / "set", {"prompt": ["a", "b"], "chosen": images[0], "rejected": images[1], "x": [1, 2]})
    pairs = read_pairs(path.parent, cache_dir=tmp_path / "cache")
    assert [record.prompt for record in pairs] == ["a", "b"]
    assert np.array_equal(np.asarray(pairs[1].decode("rejected")), np.asarray(noise(3)))
    assert pairs.ignored_columns == ("x",)


def test_parquet_with_paths_and_with_bytes(tmp_path):
    write_file(tmp_path / "set" / "img" / "a.png", png(0))
    table = parquet(tmp_path / "set", {"prompt": ["p"], "chosen": ["img/a.png"], "rejected": [png(1)]})
    (record,) = read_pairs(table, cache_dir=tmp_path / "cache")
    assert shows(record, "chosen", 0)
    assert shows(record, "rejected", 1)


def test_pickapic_ties_are_dropped_and_losers_swapped(tmp_path):
    path = parquet(tmp_path / "set", pickapic([1.0, 0.5, 0.0, 0.5, 1.0]))
    pairs = read_pairs(path, cache_dir=tmp_path / "cache")
    assert [record.prompt for record in pairs] == ["prompt 0", "prompt 2", "prompt 4"]
    assert pairs.dropped == {"tie": 2}
    assert shows(pairs[0], "chosen", 0, "JPEG")
    assert shows(pairs[1], "chosen", 5, "JPEG")
    assert shows(pairs[1], "rejected", 4, "JPEG")
    assert pairs[1].name.endswith("row 2")
    assert pairs.ignored_columns == ("image_0_uid",)


def test_pickapic_rows_without_a_label_are_dropped_and_counted(tmp_path):
    columns = pickapic([1.0, 1.0, 0.5, None], has_label=[True, False, True, True])
    pairs = read_pairs(parquet(tmp_path / "set", columns), cache_dir=tmp_path / "cache")
    assert [record.prompt for record in pairs] == ["prompt 0"]
    assert pairs.dropped == {"unlabelled": 2, "tie": 1}


def test_pickapic_with_a_strange_label(tmp_path):
    path = parquet(tmp_path / "set", pickapic([1.0, 0.7]))
    with pytest.raises(ValueError) as error:
        read_pairs(path, cache_dir=tmp_path / "cache")
    assert str(error.value) == (f"{path} row 1: label_0 is 0.7; expected 1, 0 or 0.5 (a tie); mend or remove the row")


def test_pickapic_labels_that_contradict_each_other(tmp_path):
    assert (
        len(read_pairs(parquet(tmp_path / "a", pickapic([1.0, 0.0], label_1=[0.0, 1.0])), cache_dir=tmp_path / "c"))
        == 2
    )
    path = parquet(tmp_path / "set", pickapic([1.0, 1.0], label_1=[0.0, 1.0]))
    with pytest.raises(ValueError, match=r"row 1: label_0 is 1\.0 and label_1 1\.0; expected two that add up to 1"):
        read_pairs(path, cache_dir=tmp_path / "cache")


def test_a_set_of_ties_is_refused(tmp_path):
    path = parquet(tmp_path / "set", pickapic([0.5, 0.5]))
    with pytest.raises(ValueError, match=rf"^{path}: all 2 rows were left out \(2 tie\)"):
        read_pairs(path, cache_dir=tmp_path / "cache")


def test_an_empty_set_is_refused(tmp_path):
    path = jsonl(tmp_path)
    with pytest.raises(ValueError, match=rf"^{path}: it holds no records; expected a row"):
        read_pairs(tmp_path)


def test_table_saved_by_datasets_with_splits(tmp_path):
    train = datasets.Dataset.from_dict({"prompt": ["a"], "chosen": [png(0)], "rejected": [png(1)]})
    test = datasets.Dataset.from_dict({"prompt": ["b"], "chosen": [png(0)], "rejected": [png(1)]})
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "both")
    train.save_to_disk(tmp_path / "one")
    assert read_pairs(tmp_path / "both", split="test")[0].prompt == "b"
    assert read_pairs(tmp_path / "one")[0].prompt == "a"
    with pytest.raises(ValueError) as error:
        read_pairs(tmp_path / "both", split="valid")
    assert str(error.value) == (f"{tmp_path}/both: there is no split 'valid'; expected one of train, test; name one")


@pytest.mark.parametrize("file", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_damaged_table_is_named(tmp_path, file, text):
    table = datasets.Dataset.from_dict({"prompt": ["a"], "chosen": [png(0)], "rejected": [png(1)]})
    table.save_to_disk(tmp_path / "one")
    (tmp_path / "one" / file).write_text(text)
    with pytest.raises(InputError, match=rf"^{tmp_path}/one cannot be opened \(.*\); expected"):
        read_pairs(tmp_path / "one")


def test_image_folder_of_datasets_with_splits(tmp_path):
    write_pairs(tmp_path / "set" / "train", [pair(0)])
    write_pairs(tmp_path / "set" / "test", [pair(1)])
    pairs = read_pairs(tmp_path / "set", split="test", cache_dir=tmp_path / "cache")
    assert [record.key for record in pairs] == [pair(1).key]


def test_unknown_split_of_parquet(tmp_path):
    folder = parquet(tmp_path / "set", pickapic([1.0])).parent
    with pytest.raises(ValueError, match=rf'^{folder} cannot be opened \(Unknown split "nope".*\); expected .* split$'):
        read_pairs(folder, split="nope", cache_dir=tmp_path / "cache")


def test_unknown_columns_are_listed(tmp_path):
    path = parquet(tmp_path / "set", {"text": ["a"], "win": [png(0)], "lose": [png(1)]})
    with pytest.raises(ValueError) as error:
        read_pairs(path, cache_dir=tmp_path / "cache")
    assert str(error.value).startswith(
        f"{path}: found the columns lose, text, win; expected prompt, chosen, rejected (native) or "
        "prompt, chosen_file_name, rejected_file_name (files) or caption, label_0, jpg_0, jpg_1 (pickapic) or "
    )
    assert str(error.value).endswith(" or prompt, path1, path2 (hpdv3); rename the columns")
    with pytest.raises(ValueError, match=r"expected caption, label_0, jpg_0, jpg_1 \(pickapic\); rename"):
        read_pairs(path, form="pickapic", cache_dir=tmp_path / "cache")


def test_a_missing_column_of_one_line_is_named(tmp_path):
    jsonl(tmp_path, row(), {"prompt": "p", "chosen": "img/0.png"})
    with pytest.raises(ValueError, match=r"^metadata\.jsonl:2: found the columns chosen, prompt; expected prompt, cho"):
        read_pairs(tmp_path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": None}, "prompt is None; expected text; mend or remove the record"),
        ({"chosen_score": "9"}, "chosen_score is '9'; expected a finite number; mend or remove the record"),
        ({"chosen_score": float("nan")}, "chosen_score is nan; expected a finite number; mend or remove the record"),
        ({"rejected_score": True}, "rejected_score is True; expected a finite number; mend or remove the record"),
        ({"seed": 1.5}, "seed is 1.5; expected a whole number; mend or remove the record"),
        ({"source": 3}, "source is 3; expected text; mend or remove the record"),
        ({"critique": ["a"]}, "critique is ['a']; expected text or a number; mend or remove the record"),
        ({"prompt_id": float("nan")}, "prompt_id is nan; expected text or a number; mend or remove the record"),
        ({"label_source": True}, "label_source is True; expected text or a number; mend or remove the record"),
        ({"distance": "far"}, "distance is 'far'; expected a finite number; mend or remove the record"),
        ({"distance": float("nan")}, "distance is nan; expected a finite number; mend or remove the record"),
        ({"source_row": True}, "source_row is True; expected a whole number; mend or remove the record"),
        ({"source_row": 1.5}, "source_row is 1.5; expected a whole number; mend or remove the record"),
        ({"chosen": None}, "chosen is None; expected a file name; mend or remove the record"),
    ],
)
def test_a_wrong_value_names_line_and_column(tmp_path, columns, message):
    jsonl(tmp_path, row(), row(**columns))
    with pytest.raises(ValueError) as error:
        read_pairs(tmp_path)
    assert str(error.value) == f"metadata.jsonl:2: {message}"


def test_a_missing_image_names_record_and_file(tmp_path):
    jsonl(tmp_path, row(), row(rejected="img/gone.png"))
    with pytest.raises(ValueError) as error:
        read_pairs(tmp_path)
    assert str(error.value) == (
        f"metadata.jsonl:2: the rejected image ({tmp_path}/img/gone.png) does not exist; expected a readable image "
        "file; restore it or remove the record"
    )


def test_a_file_that_is_no_image_names_record_and_file(tmp_path):
    jsonl(tmp_path, row(), row(chosen="metadata.jsonl"))
    with pytest.raises(ValueError, match=rf"^metadata\.jsonl:2: the chosen image \({tmp_path}/metadata.jsonl\) cannot"):
        read_pairs(tmp_path)


def test_an_empty_cell_names_the_row(tmp_path):
    path = parquet(tmp_path / "set", pickapic([1.0, 1.0]) | {"jpg_1": [png(1, form="JPEG"), None]})
    with pytest.raises(ValueError) as error:
        read_pairs(path, cache_dir=tmp_path / "cache")
    assert str(error.value) == (
        f"{path} row 1: the rejected image (stored in the record) cannot be read (the cell holds nothing, not an "
        "encoded image); expected a readable image file; restore it or remove the record"
    )


def test_a_path_in_a_cell_that_leads_nowhere_is_named(tmp_path):
    path = parquet(tmp_path / "set", {"prompt": ["p"], "chosen": ["no/such.png"], "rejected": [png(1)]})
    with pytest.raises(ValueError, match=r"row 0: the chosen image .* cannot be read \(.*/no/such\.png'\); expected"):
        read_pairs(path, cache_dir=tmp_path / "cache")


def test_two_sizes_and_empty_prompts_need_permission(tmp_path):
    write_file(tmp_path / "img" / "small.png", png(9, (8, 8)))
    jsonl(tmp_path, row(), row(chosen="img/small.png"), row(prompt=" "))
    with pytest.raises(ValueError, match=r"^metadata\.jsonl:2: the chosen image is 8x8, the rejected one 16x16; "):
        read_pairs(tmp_path, allow_empty_prompts=True)
    with pytest.raises(ValueError, match=r"^metadata\.jsonl:3: the prompt is empty; "):
        read_pairs(tmp_path, allow_size_mismatch=True)
    assert len(read_pairs(tmp_path, allow_empty_prompts=True, allow_size_mismatch=True)) == 3


def test_several_faults_are_counted_and_can_be_skipped(tmp_path):
    jsonl(tmp_path, row(prompt=""), "{torn\n", row(prompt="good"), row(seed="1"))
    with pytest.raises(ValueError, match=r"^metadata\.jsonl:2: not JSON .* \(and 2 more; `rpo data check` lists"):
        read_pairs(tmp_path)
    pairs = read_pairs(tmp_path, skip_faulty=True)
    assert [record.prompt for record in pairs] == ["good"]
    assert pairs.dropped == {"faulty": 3}


def test_limit_counts_rows_of_the_source(tmp_path):
    path = parquet(tmp_path / "set", pickapic([1.0, 0.5, 0.0, 1.0]))
    pairs = read_pairs(path, limit=3, cache_dir=tmp_path / "cache")
    assert (len(pairs), pairs.dropped) == (2, {"tie": 1})
    jsonl(tmp_path / "folder", *[row(prompt=str(i)) for i in range(4)])
    assert [record.prompt for record in read_pairs(tmp_path / "folder", limit=2)] == ["0", "1"]


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(tmp_path, limit):
    jsonl(tmp_path, row())
    with pytest.raises(ValueError) as error:
        read_pairs(tmp_path, limit=limit)
    assert str(error.value) == f"limit is {limit}; expected at least 1 row; leave it out to read all"


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "pairs.parquet", "pairs.jsonl"])
def test_a_path_that_does_not_exist(source):
    with pytest.raises(ValueError, match="does not exist; expected a folder or file of preference pairs; correct the"):
        read_pairs(source)


def test_a_dataset_that_cannot_be_reached(tmp_path):
    with pytest.raises(ValueError, match=r"^nobody/nothing cannot be opened \(.*\); expected a folder with metadata"):
        read_pairs("nobody/nothing", cache_dir=tmp_path)


def test_files_of_another_kind(tmp_path):
    path = write_file(tmp_path / "pairs.avro", b"prompt,chosen,rejected\n")
    with pytest.raises(ValueError) as error:
        read_pairs(path)
    assert str(error.value) == f"{path}: a .avro file; expected .jsonl or .parquet; convert it"
    damaged = write_file(tmp_path / "pairs.parquet", b"junk")
    with pytest.raises(ValueError, match=rf"^{damaged} cannot be opened \("):
        read_pairs(damaged, cache_dir=tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=rf"^{tmp_path}/empty cannot be opened \("):
        read_pairs(tmp_path / "empty", cache_dir=tmp_path / "cache")


def test_a_table_changed_on_disk_is_read_anew(tmp_path):
    write_parquet(tmp_path / "a.parquet", [pair(0)])
    first = read_pairs(tmp_path / "a.parquet", cache_dir=tmp_path / "cache")
    write_parquet(tmp_path / "a.parquet", [pair(1), pair(2)])
    second = read_pairs(tmp_path / "a.parquet", cache_dir=tmp_path / "cache")
    assert [record.key for record in second] == [pair(1).key, pair(2).key]
    assert first[0].key == pair(0).key


def test_table_records_can_be_sent_to_a_worker(tmp_path):
    write_parquet(tmp_path / "a.parquet", [pair(0)])
    pairs = read_pairs(tmp_path / "a.parquet", cache_dir=tmp_path / "cache")
    assert pickle.loads(pickle.dumps(pairs))[0].key == pair(0).key


def test_a_cell_may_hold_bytes_or_a_path(tmp_path):
    path = write_file(tmp_path / "a.png", png(0))
    home = Home(tmp_path, (tmp_path,))
    cells = [png(0), "a.png", str(path), {"bytes": png(0), "path": None}, {"bytes": None, "path": "a.png"}]
    assert [encoded_bytes(cell, home) for cell in cells] == [png(0)] * 5
    for empty in (None, "", b"", {"bytes": None, "path": None}):
        with pytest.raises(ValueError, match="the cell holds nothing, not an encoded image"):
            encoded_bytes(empty, home)
    with pytest.raises(ValueError, match="the cell holds int, not an encoded image"):
        encoded_bytes(3, home)


def test_checking_a_folder_loads_neither_torch_nor_datasets(tmp_path):
    jsonl(tmp_path, row())
    code = (
        "import sys; from rpo.data.check import check_pairs; assert check_pairs(sys.argv[1]).is_trainable; "
        "assert not {'torch', 'datasets', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_scan_collects_instead_of_stopping(tmp_path):
    jsonl(tmp_path, "[]\n", row(), row(seed="x"), row(chosen="img/gone.png"))
    found = scan(tmp_path)
    assert [fault.split(":")[1] for fault in found.faults] == ["1", "3"]
    assert [record.name for record in found.pairs] == ["metadata.jsonl:2", "metadata.jsonl:4"]
    assert all(isinstance(record, PreferencePair) for record in found.pairs)
