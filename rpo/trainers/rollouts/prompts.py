"""Where rollouts take their prompts: a list, which is visited in a shuffled order, or a source, which is drawn from.

A source is an iterable, an endless one too, or a function that gives one prompt per call, as TRL's `prompt_function`
and ddpo-pytorch's `prompt_fn`. It is drawn from when a prompt is needed, on the main process alone, and in its own
order; one that ends is visited again from its beginning. Nothing of it is saved but how many were drawn and their
digest: a resumed run draws as many again and compares them.

That is exact where the same run gives the same prompts. Each prompt is therefore drawn with the global generators of
python, numpy and torch at a state that is a function of (seed, position), and they are put back: what draws from them,
or from generators that it seeds itself, repeats. A source that does not is refused when a run is resumed.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, Protocol, final

import numpy as np
import torch

from rpo.data.order import visit
from rpo.data.prompts import as_prompt, metadata_of
from rpo.errors import InputError
from rpo.randomness import keyed_generator
from rpo.trainers.identity import prompts_identity
from rpo.trainers.preview import PROMPTS
from rpo.training.processes import Processes
from rpo.training.randomness import undisturbed_randomness

PromptLike = str | tuple[str, Any] | Mapping[str, Any]
"""A text, a text with its metadata, or a row with a "prompt" and more."""

PromptSource = Iterable[PromptLike] | Callable[[], PromptLike]
"""A list, any other iterable, or a function that gives the next prompt."""


class Prompts(Protocol):
    """What rollouts visit."""

    @property
    def shown(self) -> Sequence[str]:
        """Those that previews show and plans count: all of a list, the first of a source."""
        ...

    @property
    def described(self) -> str:
        """In words."""
        ...

    @property
    def identity(self) -> dict[str, str]:
        """What a resumed run must have in common."""
        ...

    def visited(self, places: range, seed: int) -> tuple[str, ...]:
        """The prompts of some visits, which are counted over all rollouts; every process asks for the same ones."""
        ...


def prompts_from(given: PromptSource | Prompts, seed: int) -> Prompts:
    """What a caller gave, to be visited."""
    if isinstance(given, ListedPrompts | DrawnPrompts):
        return given
    if isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping):
        return ListedPrompts(given) if isinstance(given, Sized) else DrawnPrompts(iter(given), seed)
    if callable(given):
        return DrawnPrompts(iter(given, object()), seed)
    raise InputError(
        f"prompts are a {type(given).__name__}, but a list of texts is needed; give [text, …], any other iterable, "
        "or a function that gives the next prompt; a file is read by rpo.data.prompts.read_prompts"
    )


@final
class ListedPrompts:
    """A list, each of which is visited before one is repeated."""

    def __init__(self, given: Iterable[PromptLike]):
        """Take and check all of it."""
        self.shown = tuple(as_prompt(one, f"prompt {index}") for index, one in enumerate(given))
        if not self.shown:
            raise InputError("there are no prompts, but an online trainer draws images of some; give a list of texts")

    @property
    def described(self) -> str:
        """How many."""
        return f"{len(self.shown)} prompts"

    @property
    def identity(self) -> dict[str, str]:
        """All of them in their order."""
        return prompts_identity(self.shown)

    def visited(self, places: range, seed: int) -> tuple[str, ...]:
        """As the order of the seed has them."""
        return tuple(self.shown[visit(len(self.shown), seed, place)[0]] for place in places)


@final
class DrawnPrompts:
    """A source that is drawn from when a prompt is needed; `Stateful`, so that a resumed run goes on in it."""

    described = "prompts from a source"

    def __init__(self, source: Iterator[PromptLike], seed: int):
        """Draw the first, on every process alike, since a plan and the previews show them."""
        self._source, self._seed, self._processes = source, seed, Processes()
        self._drawn: list[str] = []
        self._has_ended = False
        self._digest = hashlib.sha256()
        self._draw_until(PROMPTS)

    @property
    def identity(self) -> dict[str, str]:
        """Only what they are: when a run goes on, `load_state_dict` compares them."""
        return {"prompts": "drawn from a source"}

    @property
    def shown(self) -> Sequence[str]:
        """The first."""
        return self._drawn[:PROMPTS]

    def visited(self, places: range, seed: int) -> tuple[str, ...]:
        """In the order of the source, whatever the seed; the visits before the first rollout see its first, too."""
        found = [place if place >= 0 else -1 - place for place in places]
        self._draw_until(max(found, default=-1) + 1)
        return tuple(self._drawn[place % len(self._drawn)] for place in found)

    def _draw_until(self, count: int) -> None:
        """Draw on the main process and tell the others."""
        if self._has_ended or count <= len(self._drawn):
            return
        new, error = list[str](), None
        if self._processes.is_main:
            try:
                new = self._next(range(len(self._drawn), count))
                if not (new or self._drawn):
                    raise InputError("the prompts ended before the first; expected at least one; give another source")
            except Exception as caught:
                error = caught
        self._processes.fail_together(error)
        new, self._has_ended = self._processes.gather((new, len(new) < count - len(self._drawn)))[0]
        for prompt in new:
            self._digest.update(_line(prompt))
        self._drawn += new

    def _next(self, places: range) -> list[str]:
        found: list[str] = []
        with undisturbed_randomness(torch.device("cpu")):
            for place in places:
                state = keyed_generator("prompt", self._seed, place).initial_seed()
                random.seed(state)
                np.random.seed(state % 2**32)
                torch.default_generator.manual_seed(state)
                try:
                    found.append(as_prompt(next(self._source), f"prompt {place}"))
                except StopIteration:
                    break
                except Exception as error:
                    error.add_note(f"This was raised while prompt {place} was drawn from its source.")
                    raise
        return found

    def state_dict(self) -> dict[str, Any]:
        """How many were drawn, and their digest."""
        return {"drawn": len(self._drawn), "digest": self._digest.hexdigest()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Draw as many again, and refuse others."""
        count = state_dict["drawn"]
        self._draw_until(count)
        again = hashlib.sha256(b"".join(map(_line, self._drawn[:count])))
        if len(self._drawn) < count or again.hexdigest() != state_dict["digest"]:
            raise InputError(
                f"the source of the prompts does not give the {count} again that the run drew before it ended: "
                f"{len(self._drawn[:count])} came; expected the same ones in their order; give it from its beginning "
                "(a generator that was used goes on where it is), and seed what it draws from"
            )


def _line(prompt: str) -> bytes:
    return json.dumps([str(prompt), metadata_of(prompt)], sort_keys=True).encode() + b"\n"
