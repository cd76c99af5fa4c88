"""Settings made in Python are checked as those of a file are."""

from collections.abc import Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from rpo.settings import settings


@settings
class Part:
    size: int = 1


@settings
class Whole:
    mode: Literal["slow", "fast"] = "slow"
    level: Literal["low", "high"] | None = None
    is_on: bool = False
    count: int = 3
    rate: float | None = 0.5
    name: str = "x"
    place: Path = Path()
    window: tuple[float, float] | None = None
    layers: tuple[str, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    part: Part = field(default_factory=Part)
    spare: Part | None = None
    steps: int | Literal["auto"] = "auto"
    anything: Any = None

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError("count is negative")


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("rate", 2, 2.0),
        ("window", [0, 1], (0.0, 1.0)),
        ("layers", ["a", "b"], ("a", "b")),
        ("place", "a/b", Path("a/b")),
        ("name", Path("a/b"), "a/b"),
        ("weights", {"a": 1}, {"a": 1.0}),
        ("level", None, None),
        ("steps", 7, 7),
        ("spare", Part(3), Part(3)),
        ("anything", print, print),
    ],
)
def test_what_passes_for_a_type_becomes_it(name: str, given: object, kept: object) -> None:
    value = getattr(Whole(**{name: given}), name)
    assert value == kept
    assert type(value) is type(kept)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("mode", "fats", "Whole sets mode to 'fats', but one of slow, fast is needed; the nearest is 'fast'"),
        ("mode", None, "Whole sets mode to None, but one of slow, fast is needed"),
        ("level", "hihg", "sets level to 'hihg', but one of low, high is needed; the nearest is 'high'"),
        ("is_on", "false", "sets is_on to 'false', but true or false is needed; the default is False"),
        ("is_on", 1, "sets is_on to 1, but true or false"),
        ("count", 2.0, "sets count to 2.0, but a whole number is needed"),
        ("count", True, "sets count to True, but a whole number is needed"),
        ("rate", "0.5", "sets rate to '0.5', but a number is needed"),
        ("name", 5, "sets name to 5, but text is needed"),
        ("window", (0, 1, 2), r"sets window to \(0, 1, 2\), but a list \(a number, a number\) is needed"),
        ("layers", "to_q", r"sets layers to 'to_q', but a list \(each text\) is needed"),
        ("layers", ("to_q", 3), r"sets layers\[1\] to 3, but text is needed"),
        ("weights", {"a": "much"}, r"sets weights.a to 'much', but a number is needed"),
        ("weights", ["a"], r"sets weights to \['a'\], but a mapping \(each a number\) is needed"),
        ("part", {"size": 1}, r"sets part to \{'size': 1\}, but a section with keys size is needed"),
        ("steps", "atuo", "sets steps to 'atuo', but a whole number or one of auto is needed; the nearest is 'auto'"),
    ],
)
def test_another_type_is_refused(name: str, given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Whole(**{name: given})
    with pytest.raises(ValueError, match=message):
        replace(Whole(), **{name: given})


def test_its_own_check_comes_after() -> None:
    with pytest.raises(ValueError, match="count is negative"):
        Whole(count=-1)
    with pytest.raises(AttributeError):
        Whole().count = 5
