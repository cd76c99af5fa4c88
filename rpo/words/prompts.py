"""The language of the words world: `the word "CAT"`, for words in which consonants and vowels take turns.

A word has three to five of 17 letters; 69,420 words can be written so. One token stands for one letter, so spelling is
what the prompt says and no more. Which words a model has seen:

- `out_of_domain`: a letter in a place where no word of pretraining has it ("K" first, "O" second, …).
- `in_domain`: about 10 % of the rest, by length. No training sees them; each of their letters was seen in its place.
- `train`: what remains, for both.
"""

import hashlib
import re
from functools import cache
from itertools import product
from typing import Literal, get_args

import numpy as np

from rpo.errors import InputError

CONSONANTS, VOWELS = "BCDFHKLNPRST", "AEIOU"
"""Letters that no reader takes for one another, none wider than the pitch of the world."""

LETTERS = CONSONANTS + VOWELS
LENGTHS = (3, 4, 5)

Split = Literal["train", "in_domain", "out_of_domain"]

HELD_OUT: tuple[Split, ...] = ("in_domain", "out_of_domain")
"""The splits that fine-tuning never sees."""

HELD_OUT_PLACES = frozenset({("K", 0), ("O", 1), ("S", 2), ("D", 3), ("T", 4)})
"""Letters with the place, counted from 0, in which pretraining never sees them; elsewhere it sees all of them."""

IN_DOMAIN_SHARE = 0.1
"""Share of the known words of each length that no training sees."""

DRAWN_BY_NAME = 512
"""How many prompts the name "words" stands for, as many of each length as the division allows."""

FORM = 'the word "{}"'
_FORM = re.compile(r'the word "([A-Z]+)"')


def prompt_of(word: str) -> str:
    """What asks for a word."""
    return FORM.format(word)


def word_of(prompt: str) -> str:
    """The word that a prompt asks for.

    Raises:
        InputError: The prompt is none of this world.
    """
    found = _FORM.fullmatch(prompt)
    if not found or not _can_be_written(found[1]):
        raise InputError(
            f"the prompt {prompt!r} is none of the words world; expected {prompt_of('CAT')}, with {LENGTHS[0]} to "
            f"{LENGTHS[-1]} of the letters {LETTERS}; give such prompts only"
        )
    return found[1]


def words(split: Split) -> tuple[str, ...]:
    """All words of a split, shorter ones first."""
    return _splits()[split]


def sample_words(split: Split, count: int, seed: int) -> list[str]:
    """Draw words, none twice before all of its length have come once; the lengths take turns.

    Args:
        seed: Same seed, same words; a longer draw starts with the shorter one.
    """
    if count < 0:
        raise InputError(f"count {count} is negative, but a sample needs 0 or more words; give a count of at least 0")
    rng = np.random.default_rng(seed)
    pools = [[word for word in words(split) if len(word) == length] for length in LENGTHS]
    orders = [rng.permutation(len(pool)) for pool in pools]
    turns = [divmod(index, len(LENGTHS)) for index in range(count)]
    return [pools[which][orders[which][turn % len(pools[which])]] for turn, which in turns]


def texts(split: str, seed: int) -> list[str]:
    """The prompts that "words:SPLIT" stands for; without a split, those for training."""
    known = {name: name for name in get_args(Split)}
    if (split or "train") not in known:
        raise InputError(
            f"prompts is 'words:{split}', but the splits of words are {', '.join(known)}; name one of them"
        )
    return [prompt_of(word) for word in sample_words(known[split or "train"], DRAWN_BY_NAME, seed)]


def held_out_texts(count: int, seed: int) -> dict[str, list[str]]:
    """Prompts that no training sees, by split."""
    return {split: [prompt_of(word) for word in sample_words(split, count, seed)] for split in HELD_OUT}


def is_out_of_domain(word: str) -> bool:
    """Whether a letter stands where pretraining never sees it."""
    return not HELD_OUT_PLACES.isdisjoint((letter, place) for place, letter in enumerate(word))


@cache
def _splits() -> dict[Split, tuple[str, ...]]:
    every = [word for length in LENGTHS for word in _of_length(length)]
    known = [word for word in every if not is_out_of_domain(word)]
    return {
        "train": tuple(word for word in known if _fraction(word) >= IN_DOMAIN_SHARE),
        "in_domain": tuple(word for word in known if _fraction(word) < IN_DOMAIN_SHARE),
        "out_of_domain": tuple(word for word in every if is_out_of_domain(word)),
    }


def _of_length(length: int) -> list[str]:
    both = ([CONSONANTS, VOWELS] * length, [VOWELS, CONSONANTS] * length)
    return sorted("".join(letters) for turns in both for letters in product(*turns[:length]))


def _can_be_written(word: str) -> bool:
    if len(word) not in LENGTHS or not set(word) <= set(LETTERS):
        return False
    return all((one in VOWELS) != (other in VOWELS) for one, other in zip(word, word[1:], strict=False))


def _fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, unlike Python's own `hash`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
