"""The language of the shapes world: every sentence it knows, and which of them a model has seen.

The grammar is small enough to be listed whole (1,584 prompts), so parsing is a look-up and the splits are lists:

- `out_of_domain`: a held-out colour-shape combination, or a held-out pairing of two known ones. Never pretrained on.
- `in_domain`: about 30 % of the rest. Pretrained on, kept from fine-tuning.
- `train`: about 70 % of the rest, for fine-tuning. No paraphrase of an in-domain prompt is among them
  ("a red circle above a blue square" and "a blue square below a red circle" are always in the same split).
"""

import difflib
import hashlib
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product
from typing import Literal, get_args

import numpy as np

from rpo.errors import InputError

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 40),
    "yellow": (240, 200, 20),
    "green": (30, 150, 50),
    "cyan": (60, 215, 225),
    "blue": (30, 50, 200),
    "magenta": (210, 50, 210),
}
"""Near the six chromatic corners of the RGB cube, at least 169 apart, so that a lossy autoencoder cannot confuse two.

No name starts with a vowel: the article is always "a".
"""

SHAPES = ("circle", "square", "triangle")

PromptKind = Literal["single", "count", "conjunction", "relation"]
Relation = Literal["above", "below", "to the left of", "to the right of"]
Split = Literal["train", "in_domain", "out_of_domain"]

HELD_OUT: tuple[Split, ...] = ("in_domain", "out_of_domain")
"""The splits that fine-tuning never sees."""

DRAWN_BY_NAME = 512
"""How many prompts the name "shapes" stands for, an equal share of each kind; the few simple ones come repeatedly."""

KINDS: tuple[PromptKind, ...] = get_args(PromptKind)
RELATIONS: tuple[Relation, ...] = get_args(Relation)
NUMBER_WORDS = {2: "two", 3: "three"}

IN_DOMAIN_SHARE = 0.3
"""Share of the known prompts of each kind that fine-tuning never sees."""

HELD_OUT_PAIRING_SHARE = 0.15
"""Share of the pairings of two known combinations that pretraining never sees."""


@dataclass(frozen=True, order=True)
class ObjectType:
    """What a noun phrase names: a colour and a shape."""

    color: str
    shape: str

    def __str__(self) -> str:
        """The noun phrase without its article: "red circle"."""
        return f"{self.color} {self.shape}"


HELD_OUT_COMBINATIONS = frozenset(
    {ObjectType("yellow", "circle"), ObjectType("magenta", "square"), ObjectType("blue", "triangle")}
)
"""Three of the 18 combinations; every colour and every shape still occurs in pretraining."""


@dataclass(frozen=True)
class Prompt:
    """A sentence of this world, taken apart; take one from `prompts`, `sample_prompts` or `parse_prompt`."""

    kind: PromptKind
    objects: tuple[ObjectType, ...]
    """The types named, in the order of the text: two for a conjunction or a relation, otherwise one."""
    count: int = 1
    """How many of each type named; 2 or 3 for kind "count"."""
    relation: Relation | None = None
    """Where the first object is, seen from the second; only for kind "relation"."""

    @property
    def wanted(self) -> tuple[ObjectType, ...]:
        """Every object that the image must show, one entry per object."""
        return self.objects * self.count

    @property
    def text(self) -> str:
        """The sentence: "three green triangles"."""
        if self.kind == "count":
            return f"{NUMBER_WORDS[self.count]} {self.objects[0]}s"
        link = self.relation if self.kind == "relation" else "and"
        return f" {link} ".join(f"a {named}" for named in self.objects)


def parse_prompt(text: str) -> Prompt:
    """Take a sentence apart; the exact inverse of `Prompt.text`."""
    if text in _by_text():
        return _by_text()[text]
    nearest = difflib.get_close_matches(text, _by_text(), n=1, cutoff=0.0)
    raise InputError(
        f"prompt {text!r} is not a sentence of the shapes world, which knows one object, two or three alike, two "
        f"joined by 'and', and two in a relation ({', '.join(RELATIONS)}); the nearest it knows is {nearest[0]!r}"
    )


def prompts(split: Split) -> list[Prompt]:
    """Every prompt of a split, in a fixed order: kind by kind.

    Args:
        split: "train" and "in_domain" are what the base was pretrained on; "out_of_domain" it has never seen.
    """
    if split not in get_args(Split):
        raise InputError(f"split {split!r} does not exist; use one of {', '.join(get_args(Split))}")
    return list(_splits()[split])


def sample_prompts(split: Split, count: int, seed: int) -> list[Prompt]:
    """Draw prompts with an equal share of each kind.

    The kinds take turns, so every multiple of four is balanced. Within a kind no prompt comes twice before all have
    come once; small pools do repeat (out of domain there are only three single objects).

    Args:
        seed: Same seed, same prompts; a longer draw starts with the shorter one.
    """
    if count < 0:
        raise InputError(f"count {count} is negative, but a sample needs 0 or more prompts; give a count of at least 0")
    rng = np.random.default_rng(seed)
    everything = prompts(split)
    pools = [[prompt for prompt in everything if prompt.kind == kind] for kind in KINDS]
    orders = [rng.permutation(len(pool)) for pool in pools]
    turns = [divmod(index, len(KINDS)) for index in range(count)]
    return [pools[kind][orders[kind][turn % len(pools[kind])]] for turn, kind in turns]


def texts(split: str, seed: int) -> list[str]:
    """The prompts that "shapes:SPLIT" stands for; without a split, those for training."""
    known = {name: name for name in get_args(Split)}
    if (split or "train") not in known:
        raise InputError(
            f"prompts is 'shapes:{split}', but the splits of shapes are {', '.join(known)}; name one of them"
        )
    return [prompt.text for prompt in sample_prompts(known[split or "train"], DRAWN_BY_NAME, seed)]


def held_out_texts(count: int, seed: int) -> dict[str, list[str]]:
    """Prompts that fine-tuning never sees, by split."""
    return {split: [prompt.text for prompt in sample_prompts(split, count, seed)] for split in HELD_OUT}


@cache
def _all_prompts() -> tuple[Prompt, ...]:
    types = [ObjectType(color, shape) for color, shape in product(COLORS, SHAPES)]
    pairs = list(permutations(types, 2))
    return (
        *(Prompt("single", (named,)) for named in types),
        *(Prompt("count", (named,), count=number) for named, number in product(types, NUMBER_WORDS)),
        *(Prompt("conjunction", pair) for pair in pairs),
        *(Prompt("relation", pair, relation=relation) for pair, relation in product(pairs, RELATIONS)),
    )


@cache
def _by_text() -> dict[str, Prompt]:
    return {prompt.text: prompt for prompt in _all_prompts()}


@cache
def _splits() -> dict[Split, tuple[Prompt, ...]]:
    known = [prompt for prompt in _all_prompts() if not _is_out_of_domain(prompt)]
    in_domain: set[str] = set()
    for kind in KINDS:
        meanings = sorted({_meaning(prompt) for prompt in known if prompt.kind == kind}, key=_fraction)
        in_domain.update(meanings[: round(IN_DOMAIN_SHARE * len(meanings))])
    return {
        "train": tuple(prompt for prompt in known if _meaning(prompt) not in in_domain),
        "in_domain": tuple(prompt for prompt in known if _meaning(prompt) in in_domain),
        "out_of_domain": tuple(prompt for prompt in _all_prompts() if _is_out_of_domain(prompt)),
    }


def _is_out_of_domain(prompt: Prompt) -> bool:
    if not HELD_OUT_COMBINATIONS.isdisjoint(prompt.objects):
        return True
    names_a_pairing = prompt.kind in ("conjunction", "relation")
    pairing = " with ".join(sorted(map(str, prompt.objects)))
    return names_a_pairing and _fraction(pairing) < HELD_OUT_PAIRING_SHARE


def _meaning(prompt: Prompt) -> str:
    """One text for all sentences that say the same thing."""
    mirrored: dict[Relation | None, Relation] = {"below": "above", "to the right of": "to the left of"}
    if prompt.relation in mirrored:
        return Prompt("relation", prompt.objects[::-1], relation=mirrored[prompt.relation]).text
    if prompt.kind == "conjunction":
        return Prompt("conjunction", tuple(sorted(prompt.objects))).text
    return prompt.text


def _fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, unlike Python's own `hash`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
