import pytest

from rpo.data.prompts import HELD_OUT, read_prompts
from rpo.errors import InputError
from rpo.plugins import load_plugin
from rpo.words.prompts import (
    CONSONANTS,
    DRAWN_BY_NAME,
    HELD_OUT_PLACES,
    LENGTHS,
    VOWELS,
    held_out_texts,
    is_out_of_domain,
    prompt_of,
    sample_words,
    texts,
    word_of,
    words,
)

SPLITS = ("train", "in_domain", "out_of_domain")


def test_the_splits_share_no_word_and_are_all_there_are():
    pools = [set(words(split)) for split in SPLITS]
    assert sum(map(len, pools)) == len(set.union(*pools))
    c, v = len(CONSONANTS), len(VOWELS)
    assert len(set.union(*pools)) == c * v * (c + v) + 2 * (c * v) ** 2 + (c * v) ** 2 * (c + v)


def test_a_held_out_word_in_domain_has_each_letter_where_training_has_it():
    seen = {(letter, place) for word in words("train") for place, letter in enumerate(word)}
    assert all(set(map(tuple, zip(word, range(len(word)), strict=True))) <= seen for word in words("in_domain"))
    assert seen.isdisjoint(HELD_OUT_PLACES)


def test_a_word_out_of_domain_has_a_letter_where_training_never_has_it():
    seen = {(letter, place) for word in words("train") for place, letter in enumerate(word)}
    assert all(any((x, at) not in seen for at, x in enumerate(word)) for word in words("out_of_domain"))
    assert {letter for letter, _ in seen} == set(CONSONANTS + VOWELS)


def test_a_tenth_of_the_known_words_is_held_out():
    for length in LENGTHS:
        held, kept = (sum(len(word) == length for word in words(split)) for split in ("in_domain", "train"))
        assert 0.08 <= held / (held + kept) <= 0.12


@pytest.mark.parametrize("split", SPLITS)
def test_a_sample_takes_the_lengths_in_turn_and_repeats_nothing(split):
    drawn = sample_words(split, 60, seed=3)
    assert [len(word) for word in drawn] == [3, 4, 5] * 20
    assert len(set(drawn)) == 60
    assert drawn[:30] == sample_words(split, 30, seed=3) != sample_words(split, 30, seed=4)


def test_prompts_come_by_name():
    assert read_prompts("words", seed=5) == texts("train", 5)
    assert len(texts("", 5)) == DRAWN_BY_NAME
    assert {is_out_of_domain(word_of(text)) for text in read_prompts("words:out_of_domain", seed=0)} == {True}
    held_out = load_plugin("words", HELD_OUT, "source of prompts")(9, 0)
    assert held_out == held_out_texts(9, 0)
    assert set(held_out["in_domain"]).isdisjoint(texts("train", 0))
    with pytest.raises(InputError, match="words:test"):
        read_prompts("words:test", seed=0)


def test_a_prompt_gives_its_word_back():
    assert all(word_of(prompt_of(word)) == word for word in sample_words("train", 90, seed=0))


@pytest.mark.parametrize("prompt", ['the word "cat"', 'the word "CATT"', 'the word "CA"', 'the word "CAM"', "CAT", ""])
def test_what_is_no_prompt_of_this_world_is_refused(prompt):
    with pytest.raises(InputError):
        word_of(prompt)
