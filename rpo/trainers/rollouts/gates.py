"""Gates: a reward that counts only for images for which another reward is above a number.

    gates: {aesthetic: "ocr > 0.9"}

An image that does not pass is, for that reward, one of which nothing is known: it is in no mean and no spread of it,
and neither better nor worse than others by it. It is still compared by the other rewards. So it takes an algorithm that
compares images by each reward apart; in a sum of the raw scores there is no number that stands for "does not count".
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from rpo.errors import InputError
from rpo.plugins import nearest
from rpo.rewards import name_of
from rpo.types import PerSample

FORM = re.compile(r"(?P<name>\S+) > (?P<number>\S+)")


@dataclass(frozen=True)
class Gate:
    """What an image has to have for another reward to count."""

    by: str
    """The reward that decides."""
    above: float

    def __str__(self) -> str:
        """As it is written in the settings."""
        return f"{self.by} > {self.above:g}"


def parsed(text: str, name: str) -> Gate:
    """A gate as it is written: NAME > NUMBER."""
    found = FORM.fullmatch(text)
    try:
        above = float(found["number"]) if found else math.nan
    except ValueError:
        above = math.nan
    if found is None or not math.isfinite(above):
        raise InputError(
            f"gates has {text!r} for {name!r}; expected NAME > NUMBER, with a blank on either side of the sign, as in "
            '"ocr > 0.9"; write it so'
        )
    return Gate(found["name"], above)


def read_gates(given: Mapping[str, str], rewards: Collection[str]) -> dict[str, Gate]:
    """The gates of a run's settings, by the reward that each is for.

    Args:
        rewards: Names of the rewards of the run, as messages call them.

    Raises:
        InputError: One names a reward that there is not, or itself.
    """
    found = dict[str, Gate]()
    for key, text in given.items():
        gate = parsed(text, key)
        name, by = name_of(key), name_of(gate.by)
        for one in (name, by):
            if one not in rewards:
                raise InputError(
                    f"gates has {key!r}: {text!r}, but there is no reward {one!r} in this run; expected two of "
                    f"{', '.join(rewards)}; the nearest is {nearest(one, rewards)!r}"
                )
        if name == by:
            raise InputError(f"gates lets {key!r} depend on itself; expected another reward; name one, or leave it out")
        found[name] = Gate(by, gate.above)
    return found


def counted(parts: Mapping[str, PerSample], gates: Mapping[str, Gate]) -> dict[str, PerSample]:
    """The score of each reward where it counts; NaN where its gate is shut, and where it failed."""
    return {
        name: part.masked_fill(~(parts[gates[name].by] > gates[name].above), math.nan) if name in gates else part
        for name, part in parts.items()
    }
