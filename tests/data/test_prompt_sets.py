"""Sets of prompts: what each reader takes from a small file of its form, and where it says that a file is wrong."""

import json

import pytest

from rpo.data.prompt_sets import OWN, read_prompt_set
from rpo.data.prompts import metadata_of
from rpo.errors import InputError

PARTI = 'Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tnote\nthe word "GO"\tArtifacts\tWriting\t\n'
DRAWBENCH = 'Prompts,Category\nA red car,Colors\n"A cat, a dog",Counting\n\n"He said ""no"".",Text\n'
GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    },
]


def written(folder, name, text):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text(text, newline="")
    return folder / name


def both(found):
    return list(zip(map(str, found.prompts), found.categories, strict=True))


def test_our_own_set_is_even():
    found = read_prompt_set("general")
    assert len(found.prompts) == len(set(found.prompts)) == 64
    counts = [found.categories.count(one) for one in dict.fromkeys(found.categories)]
    assert counts == [8] * 8
    assert all('"' in prompt for prompt, kind in both(found) if kind == "text")
    assert set(read_prompt_set("general", count=2).prompts) < set(found.prompts)
    text = read_prompt_set("general", categories=["text", "counts"], count=3)
    assert [text.categories.count(one) for one in ("text", "counts")] == [3, 3] and len(text.prompts) == 6
    with pytest.raises(InputError, match="no category 'txt'; its categories are objects, animals"):
        read_prompt_set("general", categories=["txt"])
    assert read_prompt_set(str(OWN["general"])).sha256 == found.sha256


def test_the_embedded_set_has_both_held_out_domains():
    found = read_prompt_set("shapes", count=8)
    assert [found.categories.count(one) for one in ("in_domain", "out_of_domain")] == [8, 8]


def test_partiprompts(tmp_path):
    found = read_prompt_set(f"parti:{written(tmp_path, 'p.tsv', PARTI)}")
    assert both(found) == [("bond", "Abstract"), ('the word "GO"', "Artifacts")]
    assert metadata_of(found.prompts[1]) == {"challenge": "Writing"}


def test_drawbench(tmp_path):
    found = read_prompt_set(f"drawbench:{written(tmp_path, 'd.csv', DRAWBENCH)}")
    assert both(found) == [("A red car", "Colors"), ("A cat, a dog", "Counting"), ('He said "no".', "Text")]
    assert found == read_prompt_set(
        f"drawbench:{written(tmp_path, 'd.csv', DRAWBENCH.replace(chr(10), chr(13) + chr(10)))}"
    )


def test_geneval_gives_what_is_asked_for_to_the_reward(tmp_path):
    file = written(tmp_path, "g.jsonl", "\n".join(map(json.dumps, GENEVAL)))
    found = read_prompt_set(f"geneval:{file}")
    assert both(found) == [("a photo of a bench", "single_object"), ("a photo of two clocks", "counting")]
    assert metadata_of(found.prompts[1]) == {key: GENEVAL[1][key] for key in ("tag", "include", "exclude")}
    assert found.listed[0]["metadata"]["include"] == [{"class": "bench", "count": 1}]


def test_compbench_and_hpd_have_a_file_for_each_category(tmp_path):
    written(tmp_path / "t", "color_val.txt", "a red book and a yellow vase\n\na blue bench \n")
    written(tmp_path / "t", "spatial_val.txt", "a cat on a chair\n")
    written(tmp_path / "t", "color_train.txt", "not this\n")
    found = read_prompt_set(f"t2i-compbench:{tmp_path / 't'}")
    assert found.categories == ("color", "color", "spatial")
    assert found.prompts[1] == "a blue bench"
    assert read_prompt_set(f"t2i-compbench:{tmp_path / 't' / 'color_train.txt'}").categories == ("color_train",)
    written(tmp_path / "h", "anime.json", '["a", "b"]')
    written(tmp_path / "h", "photo.json", '["c"]')
    assert both(read_prompt_set(f"hpd:{tmp_path / 'h'}")) == [("a", "anime"), ("b", "anime"), ("c", "photo")]
    assert both(read_prompt_set(f"hpd:{tmp_path / 'h'}", count=1)) == [("a", "anime"), ("c", "photo")]


def test_lines_may_name_their_category_and_keep_what_else_is_known(tmp_path):
    rows = [{"prompt": "a", "category": "x", "n": 1}, {"prompt": "b", "category": "y"}]
    found = read_prompt_set(str(written(tmp_path, "mine.jsonl", "\n".join(map(json.dumps, rows)))))
    assert both(found) == [("a", "x"), ("b", "y")]
    assert [metadata_of(one) for one in found.prompts] == [{"n": 1}, {}]
    assert both(read_prompt_set(str(written(tmp_path, "plain.txt", "a\nb\n")))) == [("a", "plain"), ("b", "plain")]


def test_the_hash_is_of_all_that_is_known(tmp_path):
    def of(rows):
        return read_prompt_set(str(written(tmp_path, "m.jsonl", "\n".join(map(json.dumps, rows))))).sha256

    rows = [{"prompt": "a", "category": "x", "n": 1}, {"prompt": "b", "category": "y"}]
    others = [rows[::-1], [{**rows[0], "n": 2}, rows[1]], [{**rows[0], "category": "z"}, rows[1]]]
    assert len({of(rows), *map(of, others)}) == 4
    assert of(rows) == of([{"n": 1, "category": "x", "prompt": "a"}, rows[1]])


@pytest.mark.parametrize(
    ("source", "text", "where"),
    [
        ("parti:f.tsv", "Prompt\tCategory\na\tb\n", "f.tsv, line 1: no column Challenge"),
        ("parti:f.tsv", "Prompt\tCategory\tChallenge\na\tb\tc\na b\n", "f.tsv, line 3: 1 columns"),
        ("parti:f.tsv", "Prompt\tCategory\tChallenge\na\t\tc\n", "f.tsv, line 2: 3 columns"),
        ("parti:f.tsv", "Prompt\tCategory\tChallenge\na\tb\tc\td\n", "f.tsv, line 2: 4 columns"),
        ("parti:f.tsv", "Prompt\tCategory\tChallenge\n", "has no prompts"),
        ("drawbench:f.csv", "prompt,Category\na,b\n", "f.csv, line 1: no column Prompts"),
        ("drawbench:f.csv", 'Prompts,Category\na,b\nc,"d\n', "f.csv, line 3"),
        ("drawbench:f.csv", "Prompts,Category\na\n", "f.csv, line 2: 1 columns"),
        ("geneval:f.jsonl", '{"tag": "x"}\n', "f.jsonl, line 1"),
        ("geneval:f.jsonl", f"{json.dumps(GENEVAL[0])}\nnothing\n", "f.jsonl:2"),
        ("geneval:f.jsonl", json.dumps({**GENEVAL[0], "include": [{"count": 1}]}), "f.jsonl, line 1"),
        ("geneval:f.jsonl", json.dumps({**GENEVAL[0], "prompt": " "}), "f.jsonl, line 1: the prompt is empty"),
        ("hpd:f.json", '["a",\n"b"\n"c"]', "f.json, line 3: no JSON"),
        ("hpd:f.json", '{"a": 1}', "f.json, line 1: a JSON dict"),
        ("hpd:f.json", '["a", 3]', "f.json, entry 2: 3 is no text"),
        ("t2i-compbench:f.txt", "a\n\0b\n", "f.txt, line 2"),
        ("t2i-compbench:none", "", "there is no file"),
        ("t2i-compbench:.", "", r"has no \*_val.txt"),
        ("general2", "", "general, shapes, words, parti:PATH"),
        ("f.jsonl", '{"prompt": "a", "category": "x"}\n{"prompt": "b"}\n', "prompt 2 has no text under 'category'"),
    ],
)
def test_a_wrong_file_is_told_with_its_line(tmp_path, monkeypatch, source, text, where):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, source.rpartition(":")[2] if "f." in source else "other.dat", text)
    with pytest.raises(InputError, match=where):
        read_prompt_set(source)
