"""Pairs that a program hands in, and sets of other tools."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from rpo.data.check import check_pairs
from rpo.data.preference import PreferencePair, pair_set
from rpo.data.readers import pairs_from, read_pairs
from tests.data.samples import noise, pair, png, write_file


def shows(record, side, seed):
    return np.array_equal(np.asarray(record.decode(side)), np.asarray(noise(seed)))


def test_a_list_of_rows_may_hold_images_files_and_bytes(tmp_path):
    path = write_file(tmp_path / "a.png", png(0))
    for image in (noise(0), path, str(path), png(0), noise(0).convert("RGBA")):
        pairs = read_pairs([{"prompt": "p", "chosen": image, "rejected": noise(1), "seed": 3}])
        assert shows(pairs[0], "chosen", 0) and shows(pairs[0], "rejected", 1)
        assert (pairs[0].prompt, pairs[0].seed, pairs[0].name) == ("p", 3, "pairs[0]")
    (swapped,) = read_pairs([{"caption": "p", "jpg_0": noise(1), "jpg_1": noise(0), "label_0": 0}])
    assert shows(swapped, "chosen", 0)
    rows = [{"prompt": "p", "chosen": noise(0), "rejected": noise(1), name: 1} for name in ("sede", "seed", "scores")]
    assert read_pairs([*rows, pair(2)]).ignored_columns == ("sede",)
    assert read_pairs((pair(0), pair(1)))[1].key == pair(1).key


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no records"),
        (["p"], r"^pairs\[0\]: a str; expected a row with prompt, chosen and rejected"),
        ([{"prompt": "p", "chosen": noise(0)}], r"^pairs\[0\]: found the columns chosen, prompt; expected prompt, cho"),
        (
            [{"prompt": "p", "chosen": 3, "rejected": noise(0)}],
            r"^pairs\[0\]: an image is 3; expected a PIL image, a fi",
        ),
        ([{"prompt": "p", "chosen": "http://a/b.png", "rejected": noise(0)}], "an image is 'http://a/b.png'; expected"),
        ([{"prompt": "p", "chosen": noise(0), "rejected": noise(0)}], "are one and the same"),
        (lambda: [], "^pairs are a function; expected a folder, a file, a hub id, a Dataset, or a list of rows"),
        ((row for row in ()), "^pairs are a generator; expected"),
        (3, "^pairs are a int; expected"),
        (b"pairs", "^pairs are a bytes; expected"),
    ],
)
def test_what_holds_no_pairs_is_refused_in_one_sentence(rows, message):
    with pytest.raises(ValueError, match=message):
        pairs_from(rows)


def test_a_table_of_datasets_is_read_as_it_is(tmp_path):
    rows = {"prompt": ["a", "b"], "chosen": [noise(0), noise(2)], "rejected": [noise(1), noise(3)]}
    features = datasets.Features(prompt=datasets.Value("string"), chosen=datasets.Image(), rejected=datasets.Image())
    table = datasets.Dataset.from_dict(rows, features=features)
    for source, options in ((table, {}), (datasets.DatasetDict(train=table, test=table), {"split": "test"})):
        pairs = read_pairs(source, **options)
        assert [record.prompt for record in pairs] == ["a", "b"] and shows(pairs[1], "rejected", 3)
    assert pairs_from(table.select([1]))[0].prompt == "b"
    assert check_pairs(table).is_trainable
    with pytest.raises(ValueError, match=r"there is no split 'valid'; expected one of train, test"):
        read_pairs(datasets.DatasetDict(train=table, test=table), split="valid")


def test_rows_that_can_only_be_iterated_over_are_copied_up_to_a_limit(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": noise(2 * i), "rejected": noise(2 * i + 1), "more": i} for i in range(4)]
    features = datasets.Features(
        prompt=datasets.Value("string"),
        chosen=datasets.Image(),
        rejected=datasets.Image(),
        more=datasets.Value("int64"),
    )
    whole = datasets.Dataset.from_list(rows, features=features)
    for table in (whole.to_iterable_dataset(), datasets.IterableDataset.from_generator(lambda: iter(rows))):
        pairs = read_pairs(table, limit=3, cache_dir=tmp_path)
        assert [record.key for record in pairs] == [record.key for record in read_pairs(whole, limit=3)]
        assert pairs.ignored_columns == ("more",)
        assert shows(read_pairs(table, limit=3, cache_dir=tmp_path)[1], "rejected", 3)
        with pytest.raises(ValueError, match="^the table: read row by row without a limit"):
            read_pairs(table)
    splits = datasets.IterableDatasetDict(train=whole.to_iterable_dataset(), test=whole.to_iterable_dataset())
    assert len(read_pairs(splits, split="test", limit=2, cache_dir=tmp_path)) == 2


def test_a_broken_row_of_an_iterable_table_is_one_fault(tmp_path):
    rows = [
        {"prompt": "p", "chosen": noise(0), "rejected": noise(1)},
        {"prompt": "q", "chosen": b"x", "rejected": b"y"},
    ]
    table = datasets.IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(ValueError, match="^the table row 1: the chosen image .* cannot be decoded"):
        read_pairs(table, limit=2, cache_dir=tmp_path)
    assert read_pairs(table, limit=2, cache_dir=tmp_path, skip_faulty=True).dropped == {"faulty": 1}


def test_a_cell_without_an_image_names_the_row(tmp_path):
    table = datasets.IterableDataset.from_generator(
        lambda: iter([{"prompt": "p", "chosen": None, "rejected": noise(1)}])
    )
    with pytest.raises(ValueError, match="^the table row 0: chosen cannot be read .the cell holds nothing"):
        read_pairs(table, limit=1, cache_dir=tmp_path)


def test_a_row_without_an_original_is_no_edit(tmp_path):
    rows = {"prompt": ["a", "b", "c"], "original": [None, noise(4), None]}
    rows |= {side: [noise(2 * row + place) for row in range(3)] for place, side in enumerate(("chosen", "rejected"))}
    image = datasets.Image()
    features = datasets.Features(prompt=datasets.Value("string"), original=image, chosen=image, rejected=image)
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(tmp_path / "a.parquet")
    for source in (table, tmp_path / "a.parquet", table.to_iterable_dataset()):
        pairs = read_pairs(source, limit=3, cache_dir=tmp_path)
        assert [record.original is None for record in pairs] == [True, False, True]
    assert [record.original is None for record in read_pairs(table.select([1, 0]))] == [False, True]


@pytest.mark.parametrize("has_label", [False, np.bool_(False), 0])
def test_a_row_without_a_label_is_left_out_however_that_is_said(has_label):
    row = {"caption": "p", "jpg_0": noise(0), "jpg_1": noise(1), "label_0": 1}
    assert len(read_pairs([row, row | {"has_label": has_label}])) == 1


def test_a_table_that_the_caller_made_may_name_the_callers_files_and_a_loaded_one_may_not(tmp_path):
    path = write_file(tmp_path / "a.png", png(0))
    made = datasets.Dataset.from_dict({"prompt": ["p"], "chosen": [str(path)], "rejected": [png(1)]})
    assert shows(read_pairs(made)[0], "chosen", 0)
    made.to_parquet(tmp_path / "set.parquet")
    loaded = datasets.Dataset.from_parquet(str(tmp_path / "set.parquet"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="is no file of this table; expected the image itself in the cell"):
        read_pairs(loaded)
    relative = datasets.Dataset.from_dict({"prompt": ["p"], "chosen": ["a.png"], "rejected": [png(1)]})
    with pytest.raises(ValueError, match="is no file of this table"):
        read_pairs(relative)


def test_a_set_stays_itself(tmp_path):
    pairs = pair_set([pair(0)])
    assert pairs_from(pairs) is pairs
    assert check_pairs(pairs).records == 1


def hpdv2(folder):
    rows = [{"prompt": "p", "image_path": ["a.jpg", "b.jpg"], "human_preference": [1, 0]}]
    return write_file(folder / "train.json", json.dumps(rows).encode())


def invoke(folder):
    row = {"prompt": "p", "image_0": "a.png", "image_1": "b.png", "prefer_0": True, "prefer_1": False}
    return write_file(folder / "invoke" / "metadata.jsonl", json.dumps(row).encode()).parent


def win_lose(folder):
    for side, seed in (("win", 0), ("lose", 1)):
        write_file(folder / "pairs" / side / "0.png", png(seed))
    return folder / "pairs"


@pytest.mark.parametrize(
    ("make", "name", "advice"),
    [
        (hpdv2, "HPDv2", "the chosen image has human_preference 1"),
        (invoke, "InvokeAI", "the chosen image's prefer_ is true"),
    ],
)
def test_sets_of_other_tools_are_named_with_what_to_do(tmp_path, make, name, advice):
    with pytest.raises(ValueError) as error:
        read_pairs(make(tmp_path))
    assert name in str(error.value) and advice in str(error.value)
    assert "prompt, chosen_file_name and rejected_file_name" in str(error.value)


def test_a_table_of_another_tool_is_named(tmp_path):
    rows = {"caption": ["p"], "image_0": [png(0)], "image_1": [png(1)], "prefer_0": [True], "prefer_1": [False]}
    with pytest.raises(ValueError, match="this is a set of InvokeAI"):
        read_pairs(datasets.Dataset.from_dict(rows))
    rows = {"__key__": ["a"], "chosen.png": [png(0)], "rejected.png": [png(1)], "txt": ["p"]}
    with pytest.raises(ValueError, match="this is a set of WebDataset.*download its tar files"):
        read_pairs(datasets.Dataset.from_dict(rows))


def test_the_readers_that_there_are_still_win(tmp_path):
    folder = win_lose(tmp_path)
    row = {"prompt": "p", "chosen_file_name": "win/0.png", "rejected_file_name": "lose/0.png"}
    write_file(folder / "metadata.jsonl", json.dumps(row).encode())
    assert len(read_pairs(folder)) == 1


def test_pil_images_are_taken_as_a_viewer_shows_them():
    clear = Image.new("RGBA", (16, 16), (9, 9, 9, 0))
    (record,) = read_pairs([{"prompt": "p", "chosen": clear, "rejected": noise(1)}])
    assert record.decode("chosen").getpixel((0, 0)) == (255, 255, 255)
    assert isinstance(record, PreferencePair) and not isinstance(record.chosen, Path)
