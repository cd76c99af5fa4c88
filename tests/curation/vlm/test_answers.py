"""Text → value or fault: what is found, and that nothing is guessed."""

import json

import pytest

from rpo.curation.judge import JudgeAnswer
from rpo.curation.records import RAW_LIMIT, Critique, Fault, Instructions, Problem
from rpo.curation.vlm.answers import ANSWER_LIMIT, answer_schema, read_answer, understand
from rpo.curation.vlm.chat import Reply

GOOD = '{"problems": [{"what": "the hat is blue", "where": "top", "severity": 2}], "keep": ["the dog"], "overall": 6}'
VALUE = Critique(problems=(Problem(what="the hat is blue", where="top", severity=2),), keep=("the dog",), overall=6)


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"\n\n{GOOD}\n",
        f"```json\n{GOOD}\n```",
        f"Here is my critique:\n\n{GOOD}\n\nLet me know if you need more!",
        f"I use {{braces}} and { {1} } in prose. {GOOD}",
        f"{GOOD}\n{GOOD}",
        json.dumps(json.loads(GOOD), indent=4),
        f'<think>perhaps {{"overall": 3}}, or rather …</think>{GOOD}',
    ],
)
def test_the_object_is_found(text):
    assert read_answer(text, Critique) == VALUE


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("", "empty", "the answer is empty"),
        (" \n\t", "empty", "the answer is empty"),
        ("The image is lovely.", "parse_error", "there is no JSON object in the answer; expected one"),
        ("['problems']", "parse_error", "there is no JSON object"),
        ("{'problems': [], 'overall': 5}", "parse_error", "there is no JSON object"),
        (GOOD[:-1], "parse_error", "the JSON object in the answer is broken or cut: "),
        (GOOD[:60], "parse_error", "the JSON object in the answer is broken or cut: "),
        (GOOD.replace('"keep"', "keep"), "parse_error", "the JSON object in the answer is broken or cut: "),
        (f"<think>{GOOD}", "parse_error", "there is no JSON object"),
        (f"{GOOD} or {GOOD.replace('6', '7')}", "parse_error", "there is 2 different JSON objects in the answer"),
        (
            '{"problems": [], "overall": 5, "overall": 9}',
            "parse_error",
            "says a key twice, among ['overall', 'problems",
        ),
        ('{"problems": [], "overall": NaN}', "parse_error", "holds NaN, which is no JSON"),
        ('{"problems": [], "overall": ' + "1" * 5000 + "}", "parse_error", "Exceeds the limit"),
        ('{"a":' * 3000, "parse_error", "nested too deeply to be read"),
        ("{}", "invalid", "problems: Field required (got '{}'); overall: Field required"),
        ('{"problems": []}', "invalid", "overall: Field required"),
        ('{"overall": 5}', "invalid", "problems: Field required"),
        ('{"problems": [], "overall": "5"}', "invalid", "overall: Input should be a valid integer (got '5')"),
        ('{"problems": [], "overall": 5.5}', "invalid", "overall: Input should be a valid integer"),
        ('{"problems": [], "overall": true}', "invalid", "overall: Input should be a valid integer"),
        ('{"problems": [], "overall": 0}', "invalid", "overall: Input should be greater than or equal to 1"),
        ('{"problems": [], "overall": 11}', "invalid", "overall: Input should be less than or equal to 10"),
        ('{"problems": "none", "overall": 5}', "invalid", "problems: Input should be a valid array"),
        ('{"problems": null, "overall": 5}', "invalid", "problems: Input should be a valid array"),
        ('{"problems": [], "overall": 5, "score": 1}', "invalid", "score: Extra inputs are not permitted"),
        ('{"critique": {"problems": [], "overall": 5}}', "invalid", "problems: Field required"),
        ('{"problems": [{"what": "", "severity": 1}], "overall": 5}', "invalid", "problems.0.what: String should have"),
        ('{"problems": [{"what": "x", "severity": 4}], "overall": 5}', "invalid", "problems.0.severity: Input should"),
        ('{"problems": [{"what": "x"}], "overall": 5}', "invalid", "problems.0.severity: Field required"),
        ('{"problems": [{"what": "' + "x" * 301 + '", "severity": 1}], "overall": 5}', "invalid", "problems.0.what"),
        (
            '{"problems": [' + ", ".join(['{"what": "x", "severity": 1}'] * 21) + '], "overall": 5}',
            "invalid",
            "problem",
        ),
    ],
)
def test_nothing_is_guessed(text, kind, message):
    fault = read_answer(text, Critique)
    assert isinstance(fault, Fault)
    assert (fault.kind, fault.raw) == (kind, text)
    assert message in fault.message


def test_an_object_inside_a_broken_one_is_not_taken_for_the_answer():
    fault = read_answer('{"a" 1, "b": {"instructions": []}}', Instructions)
    assert isinstance(fault, Fault) and fault.kind == "parse_error"


@pytest.mark.parametrize("text", ["x" * 10_000_000, GOOD + " " * 10_000_000, '{"a":' * 2_000_000])
def test_ten_megabytes_are_refused_at_once_and_not_kept(text):
    fault = read_answer(text, Critique)
    assert isinstance(fault, Fault) and fault.kind == "parse_error"
    assert fault.message.startswith(f"the answer has {len(text)} characters; expected a JSON object within 100000")
    assert len(fault.raw) == RAW_LIMIT and f"{len(text)} characters in all" in fault.raw


def test_the_worst_answers_within_the_limit_are_read_in_no_time():
    for text in ("{" * ANSWER_LIMIT, ('{"a":' * ANSWER_LIMIT)[:ANSWER_LIMIT], ("{} " * ANSWER_LIMIT)[:ANSWER_LIMIT]):
        assert isinstance(read_answer(text, Critique), Fault)


def test_refusals_and_cut_answers_say_so():
    refused = understand(Reply("", refusal="I cannot look at this."), Critique)
    assert refused == Fault("invalid", "the model refused to answer: I cannot look at this.", "I cannot look at this.")
    cut = understand(Reply(GOOD[:40], is_cut=True), Critique)
    assert isinstance(cut, Fault) and cut.message.endswith("; the answer was cut: raise max_tokens")
    assert understand(Reply(GOOD, is_cut=True), Critique) == VALUE


def test_instructions_and_verdicts():
    assert read_answer('{"instructions": []}', Instructions) == Instructions(instructions=())
    for wrong in (["a"] * 4, ["w " * 26], ["one\ntwo"], ["x" * 201], [""], [1], "add a tree"):
        fault = read_answer(json.dumps({"instructions": wrong}), Instructions)
        assert isinstance(fault, Fault) and fault.kind == "invalid", wrong
    assert isinstance(read_answer('{"reason": "r", "winner": "both"}', JudgeAnswer), Fault)
    assert isinstance(read_answer('{"winner": "first"}', JudgeAnswer), Fault)


@pytest.mark.parametrize("model", [Critique, Instructions, JudgeAnswer])
def test_the_schema_is_the_one_that_the_sdk_calls_strict(model):
    import openai

    function = openai.pydantic_function_tool(model)["function"]
    sdk = function["parameters"]
    ours = answer_schema(model)
    assert ours["required"] == list(model.model_fields) == sdk["required"]
    assert ours["properties"].keys() == sdk["properties"].keys()
    for part in (ours, *ours.get("$defs", {}).values()):
        assert part["additionalProperties"] is False and part["required"] == list(part["properties"])
        assert not any("default" in value for value in part["properties"].values())
    assert {name: part["required"] for name, part in ours.get("$defs", {}).items()} == {
        name: part["required"] for name, part in sdk.get("$defs", {}).items()
    }
