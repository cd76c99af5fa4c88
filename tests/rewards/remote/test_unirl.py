"""A service of UniRL as the server: its names, numbers and errors, as its README and schemas say them."""

import json
import math

import pytest
import torch

from rpo.data.prompts import AnnotatedPrompt
from rpo.rewards import RewardError, load_reward
from rpo.rewards.base import ask
from tests.rewards.remote.servers import answering, response

LISTED = {"rewards": ["hpsv2", "wise"]}
IMAGES = torch.rand(2, 3, 8, 8)


def answered(*results, errors=None):
    return response({"results": list(results), "errors": errors or [{} for _ in results], "identities": []})


def asked(answer, more="/hpsv2?patience=1", prompts=("a", "b")):
    with answering(answer, listed=LISTED) as (place, questions):
        found = ask(load_reward(place + more), IMAGES, list(prompts), name="theirs", may_fail=True)
    return found, [json.loads(body) for _, body in questions]


def test_numbers_and_the_question():
    prompts = ["a", AnnotatedPrompt("b", {"count": 2})]
    found, (question,) = asked(answered({"hpsv2": {"hpsv2": 0.27}}, {"hpsv2": {"hpsv2": 0.25}}), prompts=prompts)
    assert found.values.tolist() == pytest.approx([0.27, 0.25])
    assert question["protocol_version"] == "1"
    assert [one["history"][0]["text"] for one in question["requests"]] == ["a", "b"]
    assert [one["required_rewards"] for one in question["requests"]] == [["hpsv2"], ["hpsv2"]]
    assert [one["metadata"] for one in question["requests"]] == [None, {"count": 2}]


def test_a_failure():
    found, _ = asked(answered({}, {"hpsv2": {"hpsv2": 0.25}}, errors=[{"hpsv2": "OutOfMemory()"}, {}]))
    assert math.isnan(found.values[0]) and found.values[1] == 0.25 and found.failures == {0: "OutOfMemory()"}


def test_a_null_is_a_failure():
    found, _ = asked(answered({"hpsv2": {"hpsv2": None}}, {"hpsv2": {"hpsv2": 0.25}}))
    assert math.isnan(found.values[0]) and 0 in found.failures


SEVERAL = answered(*[{"wise": {"wiscore": 0.5 + n, "Realism": 2.0, "Consistency": 1.0}} for n in range(2)])


def test_which_of_several_numbers_counts_has_to_be_said():
    assert asked(SEVERAL, "/wise?patience=1&score=wiscore")[0].values.tolist() == [0.5, 1.5]
    for more in ("", "&score=wisscore"):
        with pytest.raises(RewardError, match="wiscore"):
            asked(SEVERAL, "/wise?patience=1" + more)


ONE = {"hpsv2": {"hpsv2": 0.25}}


@pytest.mark.parametrize(
    "answer",
    [
        answered(ONE),
        answered(ONE, {}),
        answered(ONE, {"clip": {"clip": 0.3}}),
        answered(ONE, {"hpsv2": {}}),
        answered(ONE, {"hpsv2": 0.3}),
        answered(ONE, ONE, errors=[{"hpsv2": "failed"}, {}]),
        answered(ONE, ONE, errors=[{}]),
        answered(ONE, {"hpsv2": {"hpsv2": "0.3"}}),
        response({"scores": [1, 2]}),
    ],
)
def test_wrong_answers(answer):
    with pytest.raises(RewardError, match="nothing was taken"):
        asked(answer)


def test_what_it_does_not_take_is_not_sent():
    for more, prompts in (("&files=/tmp", ["a", "b"]), ("", ["a", AnnotatedPrompt("b", [1])])):
        with pytest.raises(RewardError):
            asked(answered(ONE, ONE), "/hpsv2?patience=1" + more, prompts)
