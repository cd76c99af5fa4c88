"""What models may say, and what is refused."""

import pytest
from pydantic import ValidationError

from rpo.curation.records import RAW_LIMIT, Critique, Fault, Instructions, Problem


def critique(**changes):
    values = {"problems": [{"what": "the circle is blue", "severity": 3}], "overall": 4} | changes
    return Critique.model_validate(values)


def test_a_critique_survives_json():
    found = critique(keep=["the square"])
    assert Critique.model_validate_json(found.model_dump_json()) == found
    assert found.problems == (Problem(what="the circle is blue", severity=3),)
    assert not found.nothing_to_fix
    assert critique(problems=[]).nothing_to_fix


@pytest.mark.parametrize(
    "changes",
    [
        {"overall": 0},
        {"overall": 11},
        {"overall": "good"},
        {"mood": "merry"},
        {"problems": "none"},
        {"problems": [{"what": "  ", "severity": 1}]},
        {"problems": [{"what": "x" * 301, "severity": 1}]},
        {"problems": [{"what": "x", "severity": 4}]},
        {"problems": [{"what": "x", "severity": 1}] * 21},
    ],
)
def test_a_critique_of_another_form_is_refused(changes):
    with pytest.raises(ValidationError):
        critique(**changes)


def test_instructions_are_one_text():
    some = Instructions(instructions=("make the circle red ", "remove the star"))
    assert some.text == "make the circle red; remove the star"
    assert not some.is_empty
    assert Instructions(instructions=()).is_empty


@pytest.mark.parametrize(
    "lines", [("a", "b", "c", "d"), ("",), ("two\nlines",), ("x" * 201,), (" ".join(["word"] * 26),)]
)
def test_instructions_that_no_editor_follows_are_refused(lines):
    with pytest.raises(ValidationError):
        Instructions(instructions=lines)


def test_a_long_answer_is_cut_and_says_how_long_it_was():
    fault = Fault("parse_error", "no JSON", raw="x" * 10_000_000)
    assert len(fault.raw) == RAW_LIMIT
    assert fault.raw.endswith("[cut: 10000000 characters in all]")
    assert Fault("parse_error", "no JSON", raw="x" * RAW_LIMIT).raw == "x" * RAW_LIMIT
