"""Numbers that mean nothing are refused where they are set, by key, before anything is loaded."""

import ast
import math
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest

from rpo.config.ranges import Range
from rpo.config.settings import field_types
from rpo.curation.editors.pipeline_editor import EditSettings

ROOT = Path(__file__).parent.parent


def settings_classes() -> Iterator[type]:
    """Every class under `@settings`, wherever it is."""
    for file in sorted((ROOT / "rpo").rglob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and "settings" in map(ast.unparse, node.decorator_list):
                module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
                yield vars(import_module(module))[node.name]


REQUIRED: dict[type, dict[str, Any]] = {EditSettings: {"num_steps": 1, "guidance_scale": 1.0}}
"""What the classes need that have no defaults."""
MAY_BE_HUGELY_NEGATIVE = {
    "DecideConfig.min_chosen",
    *(f"{run}RunConfig.rewards" for run in ("Reward", "GRPO", "ScoreAsAction", "Endpoint", "RewardGradient")),
    *(f"{objective}.margin" for objective in ("Refl", "Srpo")),
}
MAY_BE_INFINITE = {
    *(f"{cls}.max_grad_norm" for cls in ("LearningSpeed", "LearningConfig", "OnlineLearningConfig", "LoopConfig")),
    *(f"{cls}Config.max_{side}_error_ratio" for cls in ("DPO", "DPORun") for side in ("chosen", "rejected")),
}
MAY_BE_EMPTY = {
    *(
        f"{cls}Config.{name}"
        for cls in ("Chat", "Critic", "Instructor", "Judge")
        for name in ("model", "base_url", "prompt")
    ),
    *(f"EditorConfig.{name}" for name in ("model", "base_model")),
    *(f"SourceConfig.{name}" for name in ("path", "lora")),
    *(f"DecideConfig.{name}" for name in ("similarity_model", "min_chosen")),
    *(f"CurateConfig.{name}" for name in ("evaluation", "shards")),
    *(f"{cls}.trackers" for cls in ("LearningSpeed", "LearningConfig", "OnlineLearningConfig", "LoopConfig")),
    *(f"{cls}Config.held_out" for cls in ("Watch", "Monitor")),
    *(
        f"{name}{run}Config.gates"
        for name in ("Online", "GRPO", "ScoreAsAction", "Endpoint", "RewardGradient")
        for run in ("", "Run")
    ),
    *("DataConfig.source", "Dpo.time_weights"),
}
"""Where nothing has a meaning of its own, or a command that needs it says so (DataConfig.source)."""


def with_in_place(hint: Any, value: Any) -> Iterator[Any]:
    """Values of a type with `value` in the place of a number or text, wherever it has one of that kind."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        yield from with_in_place(args[0], value)
    elif hint in (int, float) and isinstance(value, float):
        yield int(value) if hint is int and math.isfinite(value) else value
    elif hint is str and isinstance(value, str):
        yield value
    elif origin in (Union, UnionType):
        yield from (one for member in args for one in with_in_place(member, value))
    elif origin is tuple:
        length = 1 if args[-1] is Ellipsis else len(args)
        yield from ((one,) * length for one in with_in_place(args[0], value))
    elif origin in (dict, Mapping):
        yield from ({"shapes": one} for one in with_in_place(args[1], value))


def taken(bad: Any) -> set[str]:
    """The fields of all classes that take a value; every refusal must name its field."""
    found = set()
    for cls in settings_classes():
        for name, hint in field_types(cls).items():
            for value in with_in_place(hint, bad):
                try:
                    cls(**{**REQUIRED.get(cls, {}), name: value})
                except ValueError as error:
                    assert re.search(rf"\b{name}\b", str(error))
                else:
                    found.add(f"{cls.__name__}.{name}")
    return found


def test_no_settings_object_takes_a_number_that_means_nothing() -> None:
    assert len(list(settings_classes())) > 25
    assert taken(math.nan) == set()
    assert taken(-math.inf) == set()
    assert taken(-1e9) == MAY_BE_HUGELY_NEGATIVE
    assert taken(math.inf) == MAY_BE_INFINITE


def test_no_settings_object_takes_blank_text_where_it_means_nothing() -> None:
    assert taken(" ") | taken("") <= MAY_BE_EMPTY


def test_no_settings_object_takes_an_empty_list_or_mapping_where_it_means_nothing() -> None:
    found = set()
    for cls in settings_classes():
        for name, hint in field_types(cls).items():
            inner = get_args(hint)[0] if get_origin(hint) is Annotated else hint
            empty = {dict: {}, Mapping: {}, tuple: ()}.get(get_origin(inner))
            if empty is not None:
                try:
                    cls(**{name: empty})
                except ValueError as error:
                    assert f"sets '{name}' to {empty!r}, but" in str(error)
                else:
                    found.add(f"{cls.__name__}.{name}")
    assert found <= MAY_BE_EMPTY


@pytest.mark.parametrize(
    ("range_", "inside", "outside"),
    [
        (Range(), [-1e308, 0, 1e308], [math.nan, math.inf, -math.inf]),
        (Range(at_least=1), [1, 2, 10**300], [0, -1, 0.999, 10**400, math.nan, math.inf]),
        (Range(above=0), [5e-324], [0, -0.0, -1, math.nan, math.inf]),
        (Range(above=0, or_inf=True), [1, math.inf], [0, math.nan, -math.inf]),
        (Range(at_least=0, at_most=1), [0, 1, 0.5], [-1e-9, 1.0000001, math.nan]),
        (Range(at_least=0, below=0.5), [0, 0.4999], [0.5, 1, math.nan]),
        (Range(above=0, at_most=1), [1], [0, 1.1]),
        (Range(other_than=0), [-1, 1e-9], [0, 0.0, math.inf, math.nan]),
    ],
    ids=lambda one: str(one) if isinstance(one, Range) else "",
)
def test_what_lies_in_a_range(range_: Range, inside: list[float], outside: list[float]) -> None:
    assert [one for one in inside if one not in range_] == []
    assert [one for one in outside if one in range_] == []
