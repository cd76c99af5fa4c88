"""What can be an order: verbs without a list of them, and what certainly is none."""

import pytest

from rpo.curation.records import Fault, Instructions
from rpo.curation.vlm.instructor import check_commands, why_no_command

ORDERS = [
    "add a red circle",
    "Desaturate the sky.",
    "please remove the sofa leg at the lower left",
    "de-blur the face",
    "Change the text on the sign to OPEN",
    "photoshop out the second tail",
    "make what is red blue",
    "On the left, add a dog",
    "turn the cat that is asleep into a dog",
    "remove the red circle but do not touch the square",
    "thicken the rope so that it no longer looks like a thread",
    "add two candles; there should be three",
]
REFUSED = [
    ("the sign is wrong", "begins with 'the', so it is no order"),
    ("There should be two cats", "begins with 'there', so it is no order"),
    ("It needs a hat", "begins with 'it', so it is no order"),
    ("two cats on the sofa", "begins with 'two', so it is no order"),
    ("3 candles", "begins with '3', so it is no order"),
    ("could you add a hat", "begins with 'could', so it is no order"),
    ("what about a hat", "begins with 'what', so it is no order"),
    ("should the hat be red", "begins with 'should', so it is no order"),
    ("add a hat?", "is a question"),
    ("dog is missing", "states something of 'dog', so it is no order"),
    ("Background looks dull", "states something of 'background', so it is no order"),
    ("red circle must move up", "states something of 'red circle', so it is no order"),
    ("do not change the sky", "only says what shall not be"),
    ("don't add anything", "only says what shall not be"),
    ("Don’t add anything", "only says what shall not be"),
    ("no extra legs", "only says what shall not be"),
    ("never mind", "only says what shall not be"),
    ("avoid clutter", "only says what shall not be"),
    ("please", "has no words"),
    ("...", "has no words"),
]


@pytest.mark.parametrize("text", ORDERS)
def test_orders(text):
    assert why_no_command(text) == ""


@pytest.mark.parametrize(("text", "problem"), REFUSED)
def test_what_is_no_order(text, problem):
    assert why_no_command(text) == problem


def test_one_that_is_no_order_spoils_the_answer():
    good = Instructions(instructions=("add a hat", "remove the tail"))
    assert check_commands(good) is good
    assert check_commands(Instructions(instructions=())) == Instructions(instructions=())
    fault = check_commands(Instructions(instructions=("add a hat", "no tail")), raw="what was said")
    assert fault == Fault(
        "invalid",
        "the instruction 'no tail' only says what shall not be; expected an order such as 'add a second cat'",
        raw="what was said",
    )
