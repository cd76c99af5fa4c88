import hashlib
import re
from collections import Counter

import pytest

from rpo.shapes.prompts import (
    COLORS,
    HELD_OUT_COMBINATIONS,
    HELD_OUT_PAIRING_SHARE,
    IN_DOMAIN_SHARE,
    KINDS,
    SHAPES,
    ObjectType,
    Prompt,
    parse_prompt,
    prompts,
    sample_prompts,
)

SPLITS = ("train", "in_domain", "out_of_domain")
EVERYTHING = [prompt for split in SPLITS for prompt in prompts(split)]
RED_CIRCLE, BLUE_SQUARE = ObjectType("red", "circle"), ObjectType("blue", "square")
SPLIT_HASH = "476c81164289a17344ff9e9ff23c0a57e57e0e15a1753872d4980c64904d7fbf"
MIRROR = {"above": "below", "below": "above", "to the left of": "to the right of", "to the right of": "to the left of"}


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("a red circle", Prompt("single", (RED_CIRCLE,))),
        ("two green triangles", Prompt("count", (ObjectType("green", "triangle"),), count=2)),
        ("three blue squares", Prompt("count", (BLUE_SQUARE,), count=3)),
        ("a red circle and a blue square", Prompt("conjunction", (RED_CIRCLE, BLUE_SQUARE))),
        ("a red circle above a blue square", Prompt("relation", (RED_CIRCLE, BLUE_SQUARE), relation="above")),
        (
            "a blue square to the left of a red circle",
            Prompt("relation", (BLUE_SQUARE, RED_CIRCLE), relation="to the left of"),
        ),
    ],
)
def test_text_and_parts_are_two_forms_of_one_prompt(text, prompt):
    assert prompt.text == text
    assert parse_prompt(text) == prompt


def test_every_text_parses_back_and_is_well_formed():
    noun = rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
    link = "and|above|below|to the left of|to the right of"
    sentence = re.compile(rf"a {noun}( ({link}) a {noun})?|(two|three) {noun}s")
    texts = [prompt.text for prompt in EVERYTHING]
    assert all(parse_prompt(prompt.text) == prompt for prompt in EVERYTHING)
    assert all(sentence.fullmatch(text) for text in texts)
    assert len(set(texts)) == len(texts) == 18 + 2 * 18 + 18 * 17 + 4 * 18 * 17


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("A red circle", "a red circle"),
        ("a red circle ", "a red circle"),
        ("two red circle", "two red circles"),
        ("a red circle on a blue square", "a red circle and a blue square"),
        ("a red circle and a red circle", "a red circle and a green circle"),
        ("photo of a red circle", "a red circle"),
    ],
)
def test_a_foreign_sentence_is_named_with_its_nearest(text, nearest):
    expected = (
        f"prompt {text!r} is not a sentence of the shapes world, which knows one object, two or three alike, two "
        "joined by 'and', and two in a relation (above, below, to the left of, to the right of); the nearest it knows "
        f"is {nearest!r}"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        parse_prompt(text)


def test_splits_are_those_the_embedded_checkpoint_was_trained_on():
    listing = "\n".join(f"{split}: {prompt.text}" for split in SPLITS for prompt in prompts(split))
    assert hashlib.sha256(listing.encode()).hexdigest() == SPLIT_HASH


def test_splits_share_no_prompt_and_each_has_all_kinds():
    assert not set(prompts("train")) & set(prompts("in_domain"))
    for split in SPLITS:
        assert {prompt.kind for prompt in prompts(split)} == set(KINDS)
    known = Counter(prompt.kind for prompt in prompts("train") + prompts("in_domain"))
    held_out = Counter(prompt.kind for prompt in prompts("in_domain"))
    for kind in KINDS:
        assert held_out[kind] / known[kind] == pytest.approx(IN_DOMAIN_SHARE, abs=0.04)


def test_out_of_domain_compositions_never_occur_in_pretraining():
    known = prompts("train") + prompts("in_domain")
    known_types = {named for prompt in known for named in prompt.objects}
    known_pairings = {frozenset(prompt.objects) for prompt in known if len(prompt.objects) == 2}
    assert len(known_types) == 15
    assert not known_types & HELD_OUT_COMBINATIONS
    assert {named.color for named in known_types} == set(COLORS)
    assert {named.shape for named in known_types} == set(SHAPES)
    for prompt in prompts("out_of_domain"):
        is_new_type = bool(HELD_OUT_COMBINATIONS & set(prompt.objects))
        is_new_pairing = len(prompt.objects) == 2 and frozenset(prompt.objects) not in known_pairings
        assert is_new_type or is_new_pairing
    new_pairings = {
        frozenset(prompt.objects)
        for prompt in prompts("out_of_domain")
        if len(prompt.objects) == 2 and not HELD_OUT_COMBINATIONS & set(prompt.objects)
    }
    assert len(new_pairings) / (15 * 14 / 2) == pytest.approx(HELD_OUT_PAIRING_SHARE, abs=0.05)


def test_every_known_type_still_occurs_in_pairs():
    paired = Counter(named for prompt in prompts("train") if len(prompt.objects) == 2 for named in prompt.objects)
    assert len(paired) == 15
    assert min(paired.values()) > 40


def test_no_paraphrase_of_an_in_domain_prompt_is_trained_on():
    train = set(prompts("train"))
    for prompt in prompts("in_domain"):
        if prompt.kind == "conjunction":
            assert Prompt("conjunction", prompt.objects[::-1]) not in train
        if prompt.relation:
            assert Prompt("relation", prompt.objects[::-1], relation=MIRROR[prompt.relation]) not in train


def test_prompts_hands_out_a_list_of_its_own():
    prompts("train").clear()
    assert prompts("train")


def test_an_unknown_split_is_refused():
    message = "split 'test' does not exist; use one of train, in_domain, out_of_domain"
    with pytest.raises(ValueError, match=message):
        prompts("test")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("split", SPLITS)
def test_samples_are_balanced_and_repeat_only_when_exhausted(split):
    sample = sample_prompts(split, 400, seed=3)
    assert Counter(prompt.kind for prompt in sample) == dict.fromkeys(KINDS, 100)
    assert Counter(prompt.kind for prompt in sample[:20]) == dict.fromkeys(KINDS, 5)
    for kind in KINDS:
        pool = [prompt for prompt in prompts(split) if prompt.kind == kind]
        uses = Counter(prompt for prompt in sample if prompt.kind == kind)
        assert set(uses) <= set(pool)
        assert max(uses.values()) - min(uses[prompt] for prompt in pool) <= 1


def test_samples_depend_on_the_seed_alone():
    assert sample_prompts("train", 50, seed=1) == sample_prompts("train", 80, seed=1)[:50]
    assert sample_prompts("train", 50, seed=1) != sample_prompts("train", 50, seed=2)
    assert sample_prompts("train", 0, seed=1) == []


def test_a_negative_sample_is_refused():
    message = "count -1 is negative, but a sample needs 0 or more prompts; give a count of at least 0"
    with pytest.raises(ValueError, match=message):
        sample_prompts("train", -1, seed=0)
