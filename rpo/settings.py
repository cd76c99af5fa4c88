"""Settings: frozen dataclasses whose values are of the types they declare, whether Python or a file makes them.

`@settings` checks every field before the class's own `__post_init__`, so that a misspelt choice is refused and not read
as "none of the others", nor a number that means nothing for one that does (`rpo.ranges`). A whole number passes for a
number, a list for a tuple, a path for text.
"""

import difflib
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

from rpo.errors import InputError
from rpo.ranges import NotEmpty, Range

Class = TypeVar("Class")

TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    NoneType: "null",
}


class WrongTypeError(InputError):
    """A value that is not of the type asked for: where within the field, what it is, and which type that would be."""

    def __init__(self, value: object, hint: Any, place: str = "") -> None:
        """Say what is wrong; `place` is that of an item, such as "[1]"."""
        self.place, self.value, self.expected = place, value, type_name(hint)
        nearest = difflib.get_close_matches(str(value), [str(one) for one in _choices(hint)], n=1, cutoff=0)
        self.advice = f"the nearest is {nearest[0]!r}" if nearest else ""
        super().__init__(f"{value!r} is given, but {self.expected} is needed; {self.advice or 'change it'}")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def settings(cls: type[Class]) -> type[Class]:
    """Make a class a frozen dataclass that refuses values of other types than it declares.

    Args:
        cls: Its fields may be plain values, paths, literals, lists, tuples, mappings, other settings, and unions.
    """
    own = next((vars(one)["__post_init__"] for one in cls.__mro__ if "__post_init__" in vars(one)), None)

    def check(self: Any) -> None:
        for name, hint in field_types(type(self)).items():
            try:
                object.__setattr__(self, name, as_type(hint, getattr(self, name)))
            except WrongTypeError as wrong:
                raise InputError(
                    f"{type(self).__name__} sets {name}{wrong.place} to {wrong.value!r}, but {wrong.expected} is "
                    f"needed; {wrong.advice or _default_advice(type(self), name)}"
                ) from None
        if own is not None:
            own(self)

    cls.__post_init__ = check  # pyright: ignore[reportAttributeAccessIssue]
    return dataclass(frozen=True)(cls)


@functools.cache
def field_types(cls: Any) -> dict[str, Any]:
    """The declared type of every field of a dataclass."""
    hints = get_type_hints(cls, include_extras=True)
    return {one.name: hints[one.name] for one in fields(cls)}


def _default_advice(cls: Any, name: str) -> str:
    default = next(one.default for one in fields(cls) if one.name == name)
    return "change it" if default is MISSING else f"the default is {default!r}"


def as_type(hint: Any, value: Any, place: str = "") -> Any:
    """A value as its declared type has it."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _in_range(hint, value, place)
    if origin in (Union, UnionType):
        return _as_one_of(hint, value, place)
    if origin in (list, tuple, Sequence) and isinstance(value, list | tuple):
        return _as_items(hint, value, place)
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {as_type(args[0], name, place): as_type(args[1], one, f"{place}.{name}") for name, one in value.items()}
    if origin is Literal:
        plain = str(value) if isinstance(value, str) else value  # a subclass of text, too
        is_right = any(plain == one and type(plain) is type(one) for one in args)
        value = plain if is_right else value  # what came from the environment is shown as it was written
    elif hint in _CONVERSIONS:
        kinds, convert = _CONVERSIONS[hint]
        if isinstance(value, kinds) and (hint is bool or not isinstance(value, bool)):
            return convert(value)
        is_right = False
    else:
        is_right = hint is Any or isinstance(value, origin or hint)
    if not is_right:
        raise WrongTypeError(value, hint, place)
    return value


_CONVERSIONS: dict[Any, tuple[Any, Callable[[Any], Any]]] = {
    bool: (bool, bool),
    int: (Integral, int),
    float: (Real, float),
    str: (str | os.PathLike, os.fspath),
    Path: (str | os.PathLike, Path),
}
"""What passes for a plain type, and how it becomes one."""


def _in_range(hint: Any, value: Any, place: str) -> Any:
    kind, *notes = get_args(hint)
    try:
        built = as_type(kind, value, place)
    except (WrongTypeError, OverflowError) as error:  # a whole number beyond every float
        is_inside = isinstance(error, WrongTypeError) and error.place != place
        raise error if is_inside else WrongTypeError(value, hint, place) from None
    if any(isinstance(note, Range | NotEmpty) and built not in note for note in notes):
        raise WrongTypeError(value, hint, place)
    return built


def _as_one_of(hint: Any, value: Any, place: str) -> Any:
    """The first member that takes the value; with a single one beside None, its own error tells more."""
    members = [member for member in get_args(hint) if member is not NoneType]
    if value is None and len(members) < len(get_args(hint)):
        return None
    if len(members) == 1:
        return as_type(members[0], value, place)
    for member in members:
        try:
            return as_type(member, value)
        except WrongTypeError:
            continue
    raise WrongTypeError(value, hint, place)


def _as_items(hint: Any, values: Sequence[Any], place: str) -> Any:
    """A list, or a tuple of any or of a fixed length."""
    origin, args = get_origin(hint), get_args(hint)
    is_fixed = origin is tuple and args[-1] is not Ellipsis
    if is_fixed and len(values) != len(args):
        raise WrongTypeError(values, hint, place)
    hints = args if is_fixed else args[:1] * len(values)
    built = [as_type(one, value, f"{place}[{at}]") for at, (one, value) in enumerate(zip(hints, values, strict=True))]
    return built if origin is list else tuple(built)


def type_name(hint: Any) -> str:
    """What a person calls a type."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return " ".join(map(str, (type_name(args[0]), *args[1:])))
    if origin is Literal:
        return "one of " + ", ".join(str(one) for one in args)
    if origin in (Union, UnionType):
        return " or ".join(type_name(member) for member in args)
    if origin in (list, tuple, Sequence, dict, Mapping):
        is_fixed, maps = origin is tuple and args[-1] is not Ellipsis, origin in (dict, Mapping)
        items = ", ".join(map(type_name, args)) if is_fixed else f"each {type_name(args[1] if maps else args[0])}"
        return f"{'a mapping' if maps else 'a list'} ({items})"
    if is_dataclass(hint):
        return f"a section with keys {', '.join(field_types(hint))}"
    return TYPE_NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def _choices(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(one for member in get_args(hint) if get_origin(member) is Literal for one in get_args(member))
