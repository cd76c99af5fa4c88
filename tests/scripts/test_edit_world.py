from collections import Counter
from itertools import islice

import numpy as np
import pytest
from numpy.typing import NDArray

from rpo.shapes.edits import parse_edits
from rpo.shapes.reader import read_scene
from rpo.shapes.world import REACH, Scene, SceneObject, render
from scripts.shapes.edit_check import carries_out
from scripts.shapes.edit_world import EDIT_TASKS, TASK_WEIGHTS, EditTriple, draw_triple, is_held_out, triples


@pytest.fixture(scope="module")
def drawn() -> list[EditTriple]:
    return list(islice(triples(3), 240))


def scene(*objects: tuple[str, str, float, float]) -> Scene:
    """Objects as (colour, shape, x, y)."""
    return Scene(tuple(SceneObject(shape, color, x, y, 8) for color, shape, x, y in objects))


def check(source: Scene, edited: Scene, instruction: str) -> tuple[bool, bool]:
    verdict = carries_out(render(source), render(edited), instruction)
    return verdict.is_done, verdict.is_rest_unchanged


def far_from(parts: set[SceneObject]) -> NDArray[np.bool_]:
    """Which pixels lie outside all of these objects, antialiased edges included."""
    rows, columns = np.mgrid[:64, :64]
    outside = np.ones((64, 64), bool)
    for part in parts:
        outside &= np.hypot(columns - part.x, rows - part.y) > REACH[part.shape] * part.radius + 2
    return outside


def test_same_seed_same_triples() -> None:
    assert list(islice(triples(5), 12)) == list(islice(triples(5), 12))
    assert list(islice(triples(5), 12)) != list(islice(triples(6), 12))


def test_everything_that_is_not_named_is_the_same_to_the_pixel(drawn: list[EditTriple]) -> None:
    for triple in drawn:
        before, after = set(triple.source.objects), set(triple.edited.objects)
        assert triple.source.background == triple.edited.background
        outside = far_from(before ^ after)
        assert np.array_equal(render(triple.source)[outside], render(triple.edited)[outside])
        most = {"add": 1, "remove": 2, "recolor": 2, "reshape": 2, "replace": 2, "repair": 3, "move": 2, "two": 6}
        assert 0 < len(before ^ after) <= most[triple.task], triple


def test_the_checker_agrees_with_what_was_rendered(drawn: list[EditTriple]) -> None:
    for triple in drawn:
        source, edited = render(triple.source), render(triple.edited)
        verdict = carries_out(source, edited, triple.instruction)
        assert verdict.is_done and verdict.is_rest_unchanged, (triple, verdict)
        nothing = carries_out(source, source, triple.instruction)
        assert not nothing.is_done and nothing.is_rest_unchanged, (triple, nothing)


def test_the_checker_denies_another_instruction_and_a_changed_rest(drawn: list[EditTriple]) -> None:
    denied = 0
    for triple, other in zip(drawn, drawn[1:], strict=False):
        verdict = carries_out(render(triple.source), render(other.edited), triple.instruction)
        denied += not (verdict.is_done and verdict.is_rest_unchanged)
        taken = Scene(triple.edited.objects[1:], triple.edited.background)
        kept = set(triple.source.objects) & set(triple.edited.objects[:1])
        if kept and triple.task != "two" and len(parse_edits(triple.instruction)) == 1:
            robbed = carries_out(render(triple.source), render(taken), triple.instruction)
            assert not (robbed.is_done and robbed.is_rest_unchanged), (triple, robbed)
    assert denied == len(drawn) - 1


def test_every_task_occurs_and_sources_are_not_only_what_prompts_ask_for(drawn: list[EditTriple]) -> None:
    tasks = Counter(triple.task for triple in drawn)
    assert set(tasks) == set(EDIT_TASKS) == set(TASK_WEIGHTS)
    seen = [read_scene(render(triple.source)).objects for triple in drawn]
    assert {len(objects) for objects in seen} == {0, 1, 2, 3, 4}
    assert sum(any(not item.shape for item in objects) for objects in seen) > 20


def test_held_out_sentences_are_kept_from_training(drawn: list[EditTriple]) -> None:
    held_out = list(islice(triples(4, is_held_out_only=True), 30))
    assert not any(is_held_out(triple.edits) for triple in drawn)
    assert all(is_held_out(triple.edits) for triple in held_out if triple.task not in ("add", "remove"))
    rng = np.random.default_rng(0)
    share = np.mean([is_held_out(draw_triple("move", rng).edits) for _ in range(200)])
    assert 0.03 < share < 0.2


SOURCE = scene(("red", "circle", 14, 14), ("blue", "square", 46, 14), ("green", "triangle", 32, 46))


@pytest.mark.parametrize(
    ("edited", "instruction", "expected"),
    [
        # Done, but something else went with it.
        (scene(("blue", "square", 46, 14)), "remove the red circle", (True, False)),
        (scene(("blue", "circle", 14, 14), ("blue", "square", 46, 14)), "change the red circle to blue", (True, False)),
        # The rest as it was, but not done: nothing, the wrong thing, a half-done thing.
        (SOURCE, "add a red circle", (False, True)),
        (scene(*[("red", "square", 14, 14), ("blue", "square", 46, 14), ("green", "triangle", 32, 46)]),
         "change the red circle to blue", (False, True)),
        # Another object was changed instead.
        (scene(("red", "circle", 14, 14), ("red", "square", 46, 14), ("green", "triangle", 32, 46)),
         "change the red circle to blue", (False, False)),
        # Moved, but not to where it should be; moved as it should be; copied instead of moved.
        (scene(("red", "circle", 14, 46), ("blue", "square", 46, 14), ("green", "triangle", 32, 46)),
         "move the red circle to the right of the green triangle", (False, True)),
        (scene(("red", "circle", 54, 46), ("blue", "square", 46, 14), ("green", "triangle", 32, 46)),
         "move the red circle to the right of the green triangle", (True, True)),
        (scene(*[("red", "circle", 14, 14), ("red", "circle", 54, 46), ("blue", "square", 46, 14)],
               ("green", "triangle", 32, 46)), "move the red circle to the right of the green triangle", (True, False)),
        # The fixed object of a relation was moved.
        (scene(("red", "circle", 54, 46), ("blue", "square", 46, 14), ("green", "triangle", 24, 46)),
         "move the red circle to the right of the green triangle", (True, False)),
        # One of two sentences.
        (scene(("blue", "square", 46, 14), ("green", "triangle", 32, 46)),
         "remove the red circle; remove the blue square", (False, True)),
        # What is named is not there.
        (SOURCE, "remove the yellow circle", (False, False)),
    ],
)  # fmt: skip
def test_the_checker_says_no_where_it_must(edited: Scene, instruction: str, expected: tuple[bool, bool]) -> None:
    assert check(SOURCE, edited, instruction) == expected


def test_it_tells_one_of_several() -> None:
    three = scene(("red", "circle", 12, 12), ("red", "circle", 50, 12), ("red", "circle", 32, 50))
    two = scene(("red", "circle", 12, 12), ("red", "circle", 32, 50))
    assert check(three, two, "remove a red circle") == (True, True)
    assert check(two, three, "add a red circle") == (True, True)
    assert check(two, two, "add a red circle") == (False, True)
    moved = scene(("red", "circle", 12, 22), ("red", "circle", 32, 50))
    assert check(three, moved, "remove a red circle") == (True, False)


def test_its_reasons_name_what_is_wrong() -> None:
    edited = scene(("red", "circle", 14, 14), ("yellow", "square", 46, 40), ("green", "triangle", 32, 20))
    verdict = carries_out(render(SOURCE), render(scene(("red", "circle", 14, 14))), "remove the red circle")
    assert "not done: remove the red circle" in verdict.reason
    assert "changed: the blue square is not as it was" in verdict.reason
    assert (
        "the source does not show what is named: a yellow circle"
        in carries_out(render(SOURCE), render(edited), "remove the yellow circle").reason
    )
    unreadable = carries_out(render(SOURCE), np.zeros((64, 64, 3), np.uint8), "remove the red circle")
    assert (unreadable.is_done, unreadable.reason) == (False, "the edited image is unreadable")
