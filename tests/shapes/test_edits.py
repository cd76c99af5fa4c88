from itertools import product

import pytest

from rpo.shapes.edits import MALFORMED, add, change, edit_words, join_edits, move, parse_edits, remove
from rpo.shapes.prompts import COLORS, RELATIONS, SHAPES, ObjectType

RED_CIRCLE, BLUE_SQUARE = ObjectType("red", "circle"), ObjectType("blue", "square")
TYPES = [ObjectType(color, shape) for color, shape in product(COLORS, SHAPES)]
PIECE = ObjectType("red", MALFORMED)


def test_the_sentences() -> None:
    assert add(RED_CIRCLE).text == "add a red circle"
    assert remove(BLUE_SQUARE).text == "remove the blue square"
    assert remove(RED_CIRCLE, is_one_of_several=True).text == "remove a red circle"
    assert change(RED_CIRCLE, ObjectType("blue", "circle")).text == "change the red circle to blue"
    assert change(RED_CIRCLE, ObjectType("red", "square")).text == "change the red circle to a red square"
    assert change(RED_CIRCLE, BLUE_SQUARE, is_one_of_several=True).text == "change a red circle to a blue square"
    assert change(PIECE, RED_CIRCLE).text == "change the red object to a red circle"
    assert move(RED_CIRCLE, "to the left of", BLUE_SQUARE).text == "move the red circle to the left of the blue square"
    assert join_edits([add(RED_CIRCLE), remove(PIECE)]) == "add a red circle; remove the red object"


def test_taking_apart_is_the_inverse_of_writing() -> None:
    several = (False, True)
    edits = [add(named) for named in TYPES]
    edits += [remove(named, is_one_of_several=some) for named, some in product([*TYPES, PIECE], several)]
    pairs = [(one, other) for one, other in product([*TYPES, PIECE], TYPES) if one != other]
    edits += [change(one, other, is_one_of_several=some) for (one, other), some in product(pairs, several)]
    edits += [
        move(one, relation, other, is_one_of_several=some)
        for (one, other), relation, some in product(pairs, RELATIONS, several)
        if one != PIECE
    ]
    assert len({edit.text for edit in edits}) == len(edits)
    assert all(parse_edits(edit.text) == (edit,) for edit in edits)
    assert parse_edits(join_edits(edits[::97])) == tuple(edits[::97])
    assert edit_words() >= {word for edit in edits for word in edit.text.split()} | {";"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "add the red circle",
        "Add a red circle",
        "add a red object",
        "remove red circle",
        "change the red circle to red",
        "change the red circle to a blue circle",  # a change of colour alone has the shorter form
        "change the red object to blue",
        "move the red object above the blue square",
        "move the red circle above the red circle",
        "move the red circle above a blue square",
        "add a red circle;remove the blue square",
        "add a red circle; ",
        "make it nicer",
    ],
)
def test_what_is_no_sentence_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="is no sentence of the shapes editor; it knows 'add a red circle'"):
        parse_edits(text)


def test_what_the_world_has_not_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="there is no pink circle in the shapes world; give one of the colours red,"):
        add(ObjectType("pink", "circle"))
    with pytest.raises(ValueError, match="there is no red object in the shapes world"):
        add(PIECE)
    with pytest.raises(ValueError, match="there is no pink object in the shapes world"):
        remove(ObjectType("pink", MALFORMED))
    with pytest.raises(ValueError, match="a red circle was to become a red circle, which it is"):
        change(RED_CIRCLE, RED_CIRCLE)
    with pytest.raises(ValueError, match="cannot be moved above another red circle"):
        move(RED_CIRCLE, "above", RED_CIRCLE)
    with pytest.raises(ValueError, match="relation 'near' does not exist; use one of above, below"):
        move(RED_CIRCLE, "near", BLUE_SQUARE)  # pyright: ignore[reportArgumentType]
