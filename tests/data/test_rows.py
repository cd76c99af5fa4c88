"""Tables of text, lists, and several files: the rows that people have, each found again by its name."""

import json

import pytest

from rpo.data.check import check_pairs
from rpo.data.readers import read_pairs, scan
from rpo.data.rows import open_rows
from rpo.data.writers import write_parquet
from tests.data.samples import pair, png, write_file


def images(folder, count=4):
    for index in range(count):
        write_file(folder / f"images/{index}.png", png(index))
    return folder


def row(index, **columns):
    return {
        "prompt": f"prompt {index}",
        "chosen_file_name": f"images/{2 * index}.png",
        "rejected_file_name": f"images/{2 * index + 1}.png",
    } | columns


def lines(*rows):
    return "".join(json.dumps(one) + "\n" for one in rows).encode()


def keys(pairs):
    return [record.key for record in pairs]


EXPECTED = keys([pair(0), pair(1)])


def test_a_table_of_text_in_the_layout_of_an_image_folder(tmp_path):
    text = (
        "prompt,chosen_file_name,rejected_file_name,chosen_score,seed,prompt_id,mine\r\n"
        '"prompt 0",images/0.png,images/1.png,0.5,7,0012,x\r\n'
        "prompt 1,images/2.png,images/3.png,,,,\r\n"
    )
    path = write_file(images(tmp_path) / "metadata.csv", b"\xef\xbb\xbf" + text.encode())
    for source in (tmp_path, path):
        pairs = read_pairs(source)
        assert keys(pairs) == EXPECTED and pairs.ignored_columns == ("mine",)
        assert (pairs[0].chosen_score, pairs[0].seed, pairs[0].details) == (0.5, 7, {"prompt_id": "0012"})
        assert (pairs[1].chosen_score, pairs[1].seed) == (None, None)
    assert [record.name for record in pairs] == ["metadata.csv:2", "metadata.csv:3"]
    assert check_pairs(tmp_path).is_trainable


def test_captions_of_a_table_may_hold_commas_line_ends_and_digits(tmp_path):
    header = "prompt,chosen_file_name,rejected_file_name"
    text = f'{header}\n"a, b\nc",images/0.png,images/1.png\n42,images/2.png,images/3.png\n'
    write_file(images(tmp_path) / "metadata.csv", text.encode())
    assert read_pairs(tmp_path).prompts == ("a, b\nc", "42")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("p,images/0.png", r"^metadata.csv:2: rejected_file_name is None; expected a file name"),
        ("p,,images/1.png,", r"^metadata.csv:2: chosen_file_name is None; expected a file name"),
        (",images/0.png,images/1.png,", r"^metadata.csv:2: the prompt is empty"),
        ("p,images/0.png,images/1.png,5,6", "^metadata.csv:2: has more cells than the header names"),
        ("p,images/0.png,images/1.png,much", "^metadata.csv:2: seed is 'much'; expected a whole number"),
        ("p,images/0.png,../1.png,", "^metadata.csv:2: rejected_file_name '../1.png' leads out of the set's folder"),
        ("p,images/0.png,images/gone.png,", "^metadata.csv:2: the rejected image .* does not exist"),
    ],
)
def test_a_broken_row_of_a_table_is_named_and_can_be_skipped(tmp_path, line, message):
    text = f"prompt,chosen_file_name,rejected_file_name,seed\n{line}\nprompt 1,images/2.png,images/3.png,1\n"
    write_file(images(tmp_path) / "metadata.csv", text.encode())
    with pytest.raises(ValueError, match=message):
        read_pairs(tmp_path)
    assert keys(read_pairs(tmp_path, skip_faulty=True)) == EXPECTED[1:]


def test_empty_cells_are_an_empty_caption_or_nothing(tmp_path):
    text = "prompt,image1,image2,votes_image1,votes_image2\n{},images/0.png,images/1.png,{},1\n"
    rows = text.format("", 2) + text.format("p", "").splitlines()[1]
    write_file(images(tmp_path) / "votes.CSV", rows.encode())
    pairs = read_pairs(tmp_path / "votes.CSV", allow_empty_prompts=True)
    assert pairs.prompts == ("",) and pairs.dropped == {"unlabelled": 1}


@pytest.mark.parametrize(("word", "dropped"), [("True", 0), ("1", 0), ("False", 1), ("0", 1)])
def test_a_label_that_a_table_says_is_none_is_none(tmp_path, word, dropped):
    rows = "caption,jpg_0,jpg_1,label_0,has_label\np,images/0.png,images/1.png,1,{}\n"
    text = rows.format(word) + rows.format("no").splitlines()[1]
    found = scan(write_file(images(tmp_path) / "a.csv", text.encode()))
    assert found.dropped["unlabelled"] == dropped and len(found.pairs) == 1 - dropped
    assert found.faults == ["a.csv:3: has_label is 'no'; expected true or false; mend or remove the row"]


@pytest.mark.parametrize("name", ["metadata.csv", "x.tar", "train.json", "win/"])
def test_a_folder_that_holds_pairs_in_two_ways_is_refused(tmp_path, name):
    first = "metadata.jsonl" if name == "metadata.csv" else "x.jsonl"
    write_file(images(tmp_path) / first, lines(row(0)))
    write_file(tmp_path / name / ".keep", b"") if name == "win/" else write_file(tmp_path / name, b"")
    (tmp_path / "lose").mkdir()
    with pytest.raises(ValueError, match=r"holds pairs in 2 ways, .*; move the others away, or give the file"):
        read_pairs(tmp_path)
    assert keys(read_pairs(tmp_path / first)) == EXPECTED[:1]


def test_hidden_files_and_folders_of_such_names_are_no_shards(tmp_path):
    write_file(images(tmp_path) / "part-0.JSONL", lines(row(0)))
    write_file(tmp_path / "._part-0.jsonl", b"\0\5")
    (tmp_path / "part-1.jsonl").mkdir()
    assert keys(read_pairs(tmp_path)) == EXPECTED[:1]


def test_several_files_of_lines_are_one_set_in_the_order_of_their_names(tmp_path):
    images(tmp_path)
    write_file(tmp_path / "part-1.jsonl", lines(row(1)))
    write_file(tmp_path / "part-0.jsonl", lines(row(0)))
    pairs = read_pairs(tmp_path)
    assert keys(pairs) == EXPECTED and [record.name for record in pairs] == ["part-0.jsonl:1", "part-1.jsonl:1"]
    write_file(tmp_path / "metadata.jsonl", lines(row(1)))
    assert keys(read_pairs(tmp_path)) == EXPECTED[1:]


def test_files_that_name_a_split_are_read_as_such(tmp_path):
    images(tmp_path)
    write_file(tmp_path / "train-00000.jsonl", lines(row(0)))
    write_file(tmp_path / "test.jsonl", lines(row(1)))
    assert keys(read_pairs(tmp_path)) == EXPECTED[:1]
    assert keys(read_pairs(tmp_path, split="test")) == EXPECTED[1:]
    with pytest.raises(ValueError, match="there is no split 'val'; expected one of test, train"):
        read_pairs(tmp_path, split="val")


def test_hpdv3_prefers_the_first_path(tmp_path):
    rows = [
        {"prompt": f"prompt {i}", "path1": f"images/{2 * i}.png", "path2": f"images/{2 * i + 1}.png", "model1": "m"}
        for i in range(2)
    ]
    path = write_file(images(tmp_path) / "train.json", json.dumps(rows).encode())
    for source in (tmp_path, path):
        pairs = read_pairs(source)
        assert keys(pairs) == EXPECTED and pairs.ignored_columns == ("model1",)
    assert pairs[1].name == "train.json[1]"


def test_a_list_may_have_the_columns_of_any_form(tmp_path):
    votes = {"image1": "images/1.png", "image2": "images/0.png", "votes_image1": 3, "votes_image2": 9}
    path = write_file(images(tmp_path) / "set.json", json.dumps([{"prompt": "prompt 0", **votes}, 3, row(1)]).encode())
    found = scan(path)
    assert keys(found.pairs) == EXPECTED
    assert found.faults == ["set.json[1]: a JSON int; expected an object; mend or remove it"]
    assert (found.pairs[0].chosen_score, found.pairs[0].rejected_score) == (9.0, 3.0)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b"{}", "a.json: a JSON dict; expected a list of objects"),
        ("a.json", b"[", "a.json: not JSON"),
        ("a.csv", b"prompt\n\xff\n", "a.csv, line 2, byte 1: the text is not UTF-8"),
        ("a.csv", b'prompt,chosen\n"p,a\nq,b\n', "a.csv, after a.csv: no CSV"),
        ("a.csv", b"prompt,prompt,chosen\np,q,a\n", "a.csv: has the column prompt twice"),
        ("a.JSON", b"[" * 100_000, "a.JSON: not JSON"),
        ("a.jsonl", b'{"prompt": ' + b"[" * 100_000, "^a.jsonl:1: not JSON"),
        ("a.tar.gz", b"", "a.tar.gz is compressed"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, data, message):
    with pytest.raises(ValueError, match=message):
        read_pairs(write_file(tmp_path / name, data))


@pytest.mark.parametrize("columns", [("votes_image1", "votes_image2"), None])
def test_votes_choose_and_ties_are_left_out(columns):
    first, second = columns or (f"weighted_results_image{n}_preference" for n in (1, 2))
    rows = [
        {"prompt": "p", "image1": png(2 * n), "image2": png(2 * n + 1), first: one, second: other}
        for n, (one, other) in enumerate([(12, 3), (1.5, 2.5), (4, 4), (None, 3)])
    ]
    pairs = read_pairs(rows)
    assert [record.chosen for record in pairs] == [png(0), png(3)]
    assert [record.margin for record in pairs] == [9, 1] and pairs.dropped == {"tie": 1, "unlabelled": 1}


def test_two_forms_in_one_row_that_may_contradict_each_other_are_refused():
    both = {"prompt": "p", "chosen": png(0), "rejected": png(1), "caption": "p", "jpg_0": png(1), "jpg_1": png(0)}
    with pytest.raises(ValueError, match=r"^pairs\[0\]: has the columns of 2 forms, native and pickapic"):
        read_pairs([{**both, "label_0": 1}])
    assert read_pairs([{**both, "label_0": 1}], form="pickapic")[0].chosen == png(1)


def test_a_folder_with_parquet_is_read_by_datasets_whatever_lies_beside_it(tmp_path):
    write_parquet(tmp_path / "set" / "a.parquet", [pair(0), pair(1)])
    assert keys(read_pairs(tmp_path / "set", cache_dir=tmp_path / "cache")) == EXPECTED
    write_file(tmp_path / "set" / "log.jsonl", b"not a pair")
    assert open_rows(tmp_path / "set", "train") is None
