"""Prompts of a text file, of JSON lines and of the embedded world; what is no source is refused."""

import copy
import doctest
import json
import pickle

import pytest

from rpo.data import prompts as module
from rpo.data.prompts import AnnotatedPrompt, caption_of, metadata_of, read_prompts
from rpo.shapes.prompts import DRAWN_BY_NAME, KINDS, parse_prompt, prompts


def test_prompts_of_a_text_file_and_of_json_lines(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n\n  two dogs \na house\n")
    assert read_prompts(str(tmp_path / "prompts.txt"), seed=0) == ["a red circle", "two dogs", "a house"]
    rows = [{"prompt": "a cat", "id": 1}, {"prompt": "a dog"}]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert read_prompts(str(tmp_path / "p.jsonl"), seed=0) == ["a cat", "a dog"]
    (tmp_path / "q.jsonl").write_text('{"prompt": "a cat"}\n{"caption": "a dog"}\n')
    with pytest.raises(ValueError, match='q.jsonl:2 of .*q.jsonl has no text under "prompt" .its keys: caption.'):
        read_prompts(str(tmp_path / "q.jsonl"), seed=0)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="empty.txt has no prompts"):
        read_prompts(str(tmp_path / "empty.txt"), seed=0)
    with pytest.raises(ValueError, match="prompts is '', .* a text file"):
        read_prompts("", seed=0)


def test_embedded_prompts_are_balanced_and_those_of_their_split():
    drawn = read_prompts("shapes", seed=1)
    assert drawn == read_prompts("shapes:train", seed=1) != read_prompts("shapes", seed=2)
    kinds = [parse_prompt(text).kind for text in drawn]
    assert len(drawn) == DRAWN_BY_NAME and {kinds.count(kind) for kind in KINDS} == {DRAWN_BY_NAME // len(KINDS)}
    assert set(drawn) <= {prompt.text for prompt in prompts("train")}
    assert set(read_prompts("shapes:in_domain", seed=1)) <= {prompt.text for prompt in prompts("in_domain")}


def test_lines_keep_what_else_is_known(tmp_path):
    lines = '{"prompt": "three cats", "count": 3, "words": ["cats"]}\n{"prompt": "a dog"}\n'
    (tmp_path / "p.jsonl").write_text(lines)
    found = read_prompts(str(tmp_path / "p.jsonl"), seed=0)
    assert found == ["three cats", "a dog"]
    assert [metadata_of(one) for one in found] == [{"count": 3, "words": ["cats"]}, {}]
    assert caption_of(found[0]) == 'three cats  {"count": 3, "words": ["cats"]}' and caption_of(found[1]) == "a dog"
    (tmp_path / "q.jsonl").write_text('{"prompt": "", "count": 3}\n')
    with pytest.raises(ValueError, match="is empty"):
        read_prompts(str(tmp_path / "q.jsonl"), seed=0)


def test_a_prompt_is_a_text_and_travels_with_what_is_known():
    prompt = AnnotatedPrompt("three cats", {"count": (3, 4)})
    assert prompt == "three cats" and hash(prompt) == hash("three cats")
    assert pickle.loads(pickle.dumps(prompt)).metadata == prompt.metadata == {"count": [3, 4]}
    assert copy.deepcopy(prompt).metadata == prompt.metadata
    assert doctest.testmod(module).failed == 0
