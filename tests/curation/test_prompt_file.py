"""Prompts: the package's own say what they must, a person's replace them, and the hash tells them apart."""

import hashlib
import json
import re

import pytest

from rpo.curation.answers import answer_schema, read_answer
from rpo.curation.instructors.commands import why_no_command
from rpo.curation.judge import JudgeAnswer
from rpo.curation.prompt_file import FOLDER, PromptFile
from rpo.curation.records import Critique, Instructions

OWN = [
    ("critique", ("caption",), Critique),
    ("instruct", ("caption", "critique"), Instructions),
    ("judge", ("caption",), JudgeAnswer),
]


@pytest.mark.parametrize(("name", "variables", "answer"), OWN)
def test_the_package_has_its_prompts(name, variables, answer):
    prompt = PromptFile.load(name, "", variables=variables)
    values = {variable: f"<{variable}, «quoted» & {{{{ raw }}}}>" for variable in variables}
    plain, shown = prompt.render(values), prompt.render(values, answer=answer)
    for value in values.values():
        assert value in plain and value in shown
    assert json.dumps(answer_schema(answer)) in shown and "schema" not in plain
    assert prompt.sha256 == hashlib.sha256((FOLDER / f"{name}.txt").read_bytes()).hexdigest()


@pytest.mark.parametrize(("name", "variables", "answer"), OWN)
def test_the_examples_in_a_prompt_are_answers(name, variables, answer):
    text = PromptFile.load(name, "", variables=variables).render(dict.fromkeys(variables, "x"))
    examples = [line for line in text.splitlines() if line.startswith("{")]
    assert len(examples) >= 2
    for line in examples:
        value = read_answer(line, answer)
        assert isinstance(value, answer), (line, value)
        if isinstance(value, Instructions):
            assert not any(map(why_no_command, value.instructions))


def test_a_template_of_ones_own(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("Look at «{{ caption }}».")
    prompt = PromptFile.load("critique", str(file), variables=("caption",))
    assert prompt.render({"caption": "a fox"}) == "Look at «a fox»."
    first = prompt.sha256
    file.write_text("Look at «{{ caption }}»!")
    assert PromptFile.load("critique", str(file), variables=("caption",)).sha256 != first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; expected a text that uses some of caption, schema; change the file"),
        (b" \n", "is empty; expected"),
        (b"{{ captoin }}", "uses captoin; expected a text that uses some of caption, schema"),
        (b"{{ caption", "is no jinja2 template in UTF-8 ("),
        (b"\xff\xfe", "is no jinja2 template in UTF-8 ("),
    ],
)
def test_a_bad_template_is_refused_when_it_is_read(content, message, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"^prompt '{re.escape(str(file))}' {re.escape(message)}"):
        PromptFile.load("critique", str(file), variables=("caption",))


def test_a_missing_template_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot be read .*; expected a jinja2 template; start from a copy of "):
        PromptFile.load("critique", str(tmp_path / "none.txt"), variables=("caption",))
