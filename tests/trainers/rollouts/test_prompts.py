"""Prompts as people have them: what is accepted and refused, and that a source gives every run the same ones."""

import itertools
import random

import numpy as np
import pytest
import torch
from datasets import Dataset

from rpo.data.prompts import AnnotatedPrompt, caption_of, metadata_of
from rpo.errors import InputError
from rpo.trainers.rollouts.prompts import DrawnPrompts, ListedPrompts, prompts_from


def first(source, count, seed=0):
    return prompts_from(source, seed).visited(range(count), seed)


def counted():
    return (f"prompt {number}" for number in itertools.count())


def test_a_list_may_have_texts_pairs_and_rows():
    given = ["a", ("b", {"answer": 2}), {"prompt": "c", "word": "see"}, AnnotatedPrompt("d", [1])]
    found = prompts_from(given, 0).shown
    assert found == ("a", "b", "c", "d")
    assert [metadata_of(one) for one in found] == [{}, {"answer": 2}, {"word": "see"}, [1]]


def test_whatever_has_a_length_is_a_list():
    for given in ({"a": 1, "b": 2}.keys(), Dataset.from_list([{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}])):
        found = prompts_from(given, 0)
        assert isinstance(found, ListedPrompts) and found.shown == ("a", "b")
    assert [metadata_of(one) for one in found.shown] == [{"n": 1}, {"n": 2}]


def test_an_endless_iterable_is_drawn_as_far_as_it_is_needed():
    drawn = []
    source = prompts_from((drawn.append(one) or one for one in counted()), 0)
    assert len(drawn) == 4  # which previews show
    assert source.shown == [f"prompt {number}" for number in range(4)]
    assert source.visited(range(6, 8), 0) == ("prompt 6", "prompt 7")
    assert len(drawn) == 8
    assert source.visited(range(-2, 0), 0) == ("prompt 1", "prompt 0")
    assert len(drawn) == 8


def test_one_that_ends_is_visited_again_from_its_beginning():
    assert first(iter("abcde"), 12) == tuple("abcdeabcdeab")
    assert first(iter("a"), 3) == tuple("aaa")


def test_a_function_is_asked_for_each_prompt():
    number = itertools.count()
    found = first(lambda: (f"prompt {next(number)}", {"n": 1}), 6)
    assert found[5] == "prompt 5" and metadata_of(found[5]) == {"n": 1}


def drawing():
    """As ddpo-pytorch's prompt functions: from global generators that nobody seeded."""
    return f"{random.random()} {np.random.rand()} {torch.rand(()).item()}", {}


def test_a_function_of_the_global_generators_is_one_of_seed_and_position_and_disturbs_nothing():
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    found = first(drawing, 6)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected
    assert len(set(found)) == 6
    source = prompts_from(drawing, 0)
    for place in range(6):  # in other portions
        random.random()
        assert source.visited(range(place, place + 1), 0) == (found[place],)
    assert first(drawing, 6, seed=1) != found


class Endless:
    """Seeds itself."""

    def __iter__(self):
        own = random.Random(7)
        while True:
            yield (str(own.random()), {"draw": [own.random()]})


@pytest.mark.parametrize("make", [counted, lambda: drawing, Endless, lambda: iter("abcde")])
def test_what_repeats_goes_on_where_it_was(make):
    before, after = (prompts_from(make(), 3) for _ in range(2))
    seen = before.visited(range(8), 3)
    after.load_state_dict(before.state_dict())
    assert after.state_dict() == before.state_dict()
    assert after.visited(range(8), 3) == seen
    assert after.visited(range(8, 12), 3) == before.visited(range(8, 12), 3)
    assert list(map(metadata_of, after.visited(range(12), 3))) == list(map(metadata_of, before.visited(range(12), 3)))
    before.load_state_dict(prompts_from(make(), 3).state_dict())  # from an earlier checkpoint, in the same process


def used():
    found = counted()
    next(found)
    return found


OTHERS = {
    "used": used,
    "shorter": lambda: itertools.islice(counted(), 6),
    "unseeded": lambda: lambda: str(random.SystemRandom().random()),
    "other metadata": lambda: ((one, {"n": 1}) for one in counted()),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_does_not_repeat_is_refused(name):
    before = prompts_from(counted(), 0)
    before.visited(range(8), 0)
    with pytest.raises(InputError, match="does not give the 8 again.*from its beginning.*seed"):
        prompts_from(OTHERS[name](), 0).load_state_dict(before.state_dict())


@pytest.mark.parametrize("empty", [AnnotatedPrompt(""), ("", {})])
def test_no_prompt_is_a_prompt_where_it_is_meant(empty):
    assert prompts_from([empty], 0).shown == ("",)
    assert first(lambda: empty, 2) == ("", "")
    assert caption_of(prompts_from([empty], 0).shown[0]) == "(no prompt)"


REFUSED = {
    "an empty text": ([""], r"prompt 0 is ''.*AnnotatedPrompt\(''\)"),
    "a blank": (["a", AnnotatedPrompt("  ")], "prompt 1 is '  '"),
    "an empty row": ([{"prompt": ""}], "prompt 0: the prompt is empty"),
    "a row without": ([{"text": "a"}], 'prompt 0 has no text under "prompt"'),
    "a number": ([3], "prompt 0 is 3"),
    "a list of lists": ([["a", {}]], "prompt 0 is"),
    "half a character": (["\ud800"], "prompt 0 holds half"),
    "one text": ("a cat", "prompts are a str"),
    "bytes": (b"a cat", "prompts are a bytes"),
    "a mapping": ({"prompt": "a"}, "prompts are a dict"),
    "a number for all": (3, "prompts are a int"),
    "nothing": ([], "there are no prompts"),
    "a source of nothing": (iter(()), "ended before the first"),
    "an object": ([("a", {"x": object()})], "metadata of the prompt 'a'.*JSON"),
    "not a number": ([("a", {"x": float("nan")})], "metadata of the prompt 'a'.*JSON"),
    "a bad source": (iter(["a", "b", 3]), "prompt 2 is 3"),
    "a function": (lambda: None, "prompt 0 is None"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_prompt_is_named(name):
    given, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        prompts_from(given, 0)


def test_an_error_of_the_source_says_at_which_prompt():
    def failing():
        yield from "ab"
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError) as caught:
        prompts_from(failing(), 0)
    assert "prompt 2" in caught.value.__notes__[0]


def test_metadata_are_part_of_what_a_run_is_made_of():
    plain, told, other = (prompts_from(given, 0).identity for given in (["a"], [("a", {"n": 1})], [("a", {"n": 2})]))
    assert len({tuple(one.items()) for one in (plain, told, other)}) == 3
    assert prompts_from([("a", {})], 0).identity == plain


def test_drawn_prompts_are_taken_as_they_are():
    source = DrawnPrompts(counted(), 0)
    assert prompts_from(source, 1) is source
