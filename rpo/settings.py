"""Settings: frozen dataclasses whose values are of the types they declare, whether Python or a file makes them.

Pydantic checks every field before the class's own `__post_init__`, strictly: a whole number passes for a number, a list
for a tuple, a path for text, and nothing else for what it is not. An error lists every wrong value at once.

A setting that was renamed stays in `renamed` of its class: the old key, from there, and what to give instead.
"""

import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, dataclass_transform, get_args, get_origin
from typing import get_type_hints as type_hints

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Strict,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    WrapValidator,
)
from pydantic.dataclasses import dataclass as pydantic_dataclass

from rpo.errors import InputError
from rpo.from_environment import FromEnvironment
from rpo.plugins import nearest
from rpo.ranges import NotEmpty, Range

Class = TypeVar("Class")
Source = Callable[[str], tuple[str, str]]
"""The whole key that was set at, within or around a key, and by whom."""

TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    NoneType: "null",
}


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def settings(cls: type[Class]) -> type[Class]:
    """Make a class a frozen dataclass that refuses values of other types than it declares.

    Args:
        cls: Its fields may be plain values, paths, literals, lists, tuples, mappings, other settings, one of several
            (`Field(discriminator="kind")`), and unions.
    """
    declared = inspect.get_annotations(cls, eval_str=True)
    cls.__annotations__ = {name: _strict(hint) for name, hint in declared.items()}
    config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)
    made: Any = pydantic_dataclass(frozen=True, config=config)(cls)
    made.__annotations__ = declared
    init = made.__init__

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **given: Any) -> None:
        given.update(zip([one.name for one in fields(self)], args, strict=False))
        try:
            init(self, **given)
        except ValidationError as error:
            raise explained(error, type(self), given, lambda key: (key, type(self).__name__)) from None

    made.__init__ = checked
    return made


def checked(cls: type[Class], values: Any, source: Source) -> Class:
    """Settings of plain data; sections are mappings."""
    try:
        return cast(Any, cls).__pydantic_validator__.validate_python(values)
    except ValidationError as error:
        raise explained(error, cls, values, source) from None


def _text(value: Any, is_text: Callable[[Any], str]) -> str:
    text = is_text(os.fspath(value) if isinstance(value, os.PathLike) else value)
    return value if isinstance(value, FromEnvironment) else text


def _path(value: Any) -> Any:
    return Path(value) if isinstance(value, str | os.PathLike) else value


_STRICT: dict[Any, Any] = {
    **{kind: Annotated[kind, Strict()] for kind in (bool, int, float)},
    str: Annotated[str, Strict(), WrapValidator(_text)],
    Path: Annotated[Path, BeforeValidator(_path)],
}
_FROM_LIST = (Strict(), BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value))


def _strict(hint: Any) -> Any:
    """A type as pydantic has to see it to be as strict as we are."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return Annotated[(_strict(args[0]), *(one for note in args[1:] for one in _checks(note, args[0])))]
    inner = tuple(map(_strict, args)) if origin is not Literal else args
    if origin in (Union, UnionType):
        return Union[inner]  # noqa: UP007
    if origin is tuple:
        return Annotated[(tuple[inner], *_FROM_LIST)]  # pyright: ignore[reportInvalidTypeForm]
    generic: Any = origin
    return generic[inner] if origin in (list, Sequence, dict, Mapping) else _STRICT.get(hint, hint)


def _checks(note: Any, kind: Any) -> Iterator[Any]:
    if not isinstance(note, Range | NotEmpty):
        yield note
        return

    def inside(value: Any) -> Any:
        if value not in note:
            raise ValueError
        return value

    yield AfterValidator(inside)
    if isinstance(note, Range):
        yield WithJsonSchema({"type": "integer" if kind is int else "number", **note.json_schema})


@functools.cache
def field_types(cls: Any) -> dict[str, Any]:
    """The declared type of every field of a dataclass."""
    hints = type_hints(cls, include_extras=True)
    return {one.name: hints[one.name] for one in fields(cls)}


def sections(hint: Any) -> tuple[Any, ...]:
    """The settings classes that a type names: none for a plain value, several for one of several kinds."""
    if get_origin(hint) is Annotated:
        return sections(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return tuple(one for part in get_args(hint) for one in sections(part))
    return (hint,) if is_dataclass(hint) else ()


def kind_of(cls: Any) -> str:
    """Which kind of several a settings class is."""
    return get_args(field_types(cls)["kind"])[0]


def default_of(one: Field[Any], instance: object = None) -> Any:
    """What a field is when nobody sets it: as in `instance`, or as its class says; MISSING if it must be set."""
    if is_dataclass(instance):
        return getattr(instance, one.name)
    return one.default_factory() if one.default_factory is not MISSING else one.default


@dataclass(frozen=True)
class FieldInfo:
    """One line of a configuration's help: a key and what it means."""

    key: str
    type_name: str
    default: str
    doc: str


def describe_fields(cls: Any, default: object = None) -> list[FieldInfo]:
    """Every key of a configuration class, with type, default and the docstring under the field, in source order.

    Args:
        default: An instance whose values are the defaults; None for those of the class.
    """
    described: list[FieldInfo] = []
    for one in fields(cls):
        hint, value = field_types(cls)[one.name], default_of(one, default)
        doc = field_doc(cls, one.name)
        members = sections(hint)
        if len(members) > 1:
            shown = kind_of(type(value)) if is_dataclass(value) else _shown(value)
            described.append(FieldInfo(f"{one.name}.kind", _kinds(hint), shown, doc))
        for member in members:
            inner = describe_fields(member, value if isinstance(value, member) else None)
            of = f"; of kind {kind_of(member)}" if len(members) > 1 else ""
            described += [
                FieldInfo(f"{one.name}.{info.key}", info.type_name + of, info.default, info.doc)
                for info in inner
                if not (of and info.key == "kind")
            ]
        if not members:
            described.append(FieldInfo(one.name, type_name(hint), _shown(value), doc))
    return described


def field_doc(cls: Any, name: str) -> str:
    """The docstring under a field, wherever it is declared, on one line."""
    declared = (vars(one).get("__pydantic_fields__", {}).get(name) for one in cls.__mro__)
    return next((" ".join(one.description.split()) for one in declared if one and one.description), "")


def json_schema(cls: Any) -> dict[str, Any]:
    """What an editor needs to know of a configuration class, to help with its YAML."""
    schema = TypeAdapter(cls).json_schema()
    waiting, parts = [cls], {cls.__name__: schema, **schema.get("$defs", {})}
    while waiting:
        one = waiting.pop()
        for name, hint in field_types(one).items():
            parts[one.__name__]["properties"][name]["description"] = field_doc(one, name)
            waiting += sections(hint)
    return schema


def type_name(hint: Any) -> str:
    """What a person calls a type."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return " ".join([type_name(args[0]), *(str(one) for one in args[1:] if isinstance(one, Range | NotEmpty))])
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


@dataclass(frozen=True)
class _Spot:
    """Where an error lies: the key, the settings class and its own name of it, the type and the value there."""

    key: str
    value: Any
    hint: Any
    owners: Mapping[str, Any]
    """The settings classes on the way, by their keys."""


def _spot(cls: Any, values: Any, place: Sequence[Any]) -> _Spot:
    key, hint, owners = "", cls, {"": cls}
    value: Any = values
    for at, part in enumerate(place):
        bare = _bare(hint)
        members, origin = sections(bare), get_origin(bare)
        if part == "[key]":
            return _Spot(key, place[at - 1], str, owners)
        if len(members) > 1:  # the part is the kind, or what was given for it
            hint = owners[key] = next((one for one in members if kind_of(one) == part), bare)
            continue
        if members:
            owners[key] = members[0]
            hint = field_types(members[0]).get(str(part), Any)
        elif origin in (list, tuple, Sequence):
            if part >= len(value or ()):  # one too few: the whole list is wrong
                break
            items = get_args(bare)
            hint = items[part] if origin is tuple and items[-1] is not Ellipsis else items[0]
        elif origin in (dict, Mapping):
            hint = get_args(bare)[1]
        else:  # within a union: what it is as a whole counts
            break
        key = f"{key}[{part}]" if isinstance(part, int) and origin else f"{key}.{part}".removeprefix(".")
        has_part = (
            isinstance(part, int) and isinstance(value, list | tuple) or isinstance(value, Mapping) and part in value
        )
        value = value[part] if has_part else None
    return _Spot(key, value, hint, owners)


def _bare(hint: Any) -> Any:
    """A type without its notes, and without "or nothing"."""
    if get_origin(hint) is Annotated:
        return _bare(get_args(hint)[0])
    others = [one for one in get_args(hint) if one is not NoneType]
    is_optional = get_origin(hint) in (Union, UnionType) and len(others) == 1
    return _bare(others[0]) if is_optional else hint


def explained(error: ValidationError, cls: Any, values: Any, source: Source) -> InputError:
    """What is wrong, where it was set, what is needed and what to do: a line for each wrong key."""
    found: dict[str, str] = {}
    for one in error.errors(include_url=False):
        spot = _spot(cls, values, one["loc"])
        if one["type"] == "value_error" and sections(spot.hint):  # a settings class refused its values together
            text = str(one.get("ctx", {})["error"])
        elif one["type"] in ("unexpected_keyword_argument", "invalid_key"):
            text = _unknown(cls, spot, source)
        elif one["type"] == "missing" and isinstance(one["loc"][-1], str):
            text = f"{cls.__name__} needs {spot.key}, which is not set; set it"
        else:
            text = _mismatch(cls, spot, source)
        found.setdefault(spot.key, text)
    lines = list(found.values())
    return InputError(lines[0] if len(lines) == 1 else "\n- ".join((f"{len(lines)} settings are wrong:", *lines)))


def _unknown(cls: Any, spot: _Spot, source: Source) -> str:
    key, who = source(spot.key)
    for place, owner in spot.owners.items():
        for old, advice in getattr(owner, "renamed", {}).items():
            if f"{key}.".startswith(f"{place}.{old}.".removeprefix(".")):
                return f"{who} sets '{key}', but {advice}"
    place, owner = list(spot.owners.items())[-1]
    keys = list(_described(cls))
    kinds = [kind_of(other) for other in _siblings(cls, place) if spot.key.rpartition(".")[2] in field_types(other)]
    if kinds:
        return (
            f"{who} sets '{key}', but {place}.kind is {kind_of(owner)}, and it belongs to kind {' and '.join(kinds)}; "
            f"leave it out, or give {place}.kind={kinds[0]}"
        )
    namesakes = [one for one in keys if one.rpartition(".")[2] == key.rpartition(".")[2]]
    return f"{who} sets '{key}', but {cls.__name__} has no such key; the nearest is '{nearest(key, namesakes or keys)}'"


@functools.cache
def _described(cls: Any) -> dict[str, str]:
    return {info.key: info.default for info in describe_fields(cls)}


def _siblings(cls: Any, key: str) -> tuple[Any, ...]:
    """The members of the union that stands at a key."""
    members: tuple[Any, ...] = (cls,)
    for name in filter(None, key.split(".")):
        members = tuple(one for member in members for one in sections(field_types(member).get(name)))
    return members if len(members) > 1 else ()


def _mismatch(cls: Any, spot: _Spot, source: Source) -> str:
    members = sections(spot.hint)
    key, value, choices = spot.key, spot.value, list(_choices(spot.hint))
    expected = type_name(_bare(spot.hint) if members else spot.hint)
    if len(members) > 1:
        choices, expected = [kind_of(one) for one in members], _kinds(spot.hint)
        is_section = isinstance(value, Mapping)
        key, value = (f"{key}.kind", value.get("kind")) if is_section else (key, value)
        expected = expected if is_section else f"a section with a kind, {expected},"
    _, who = source(key)
    default = _described(cls).get(key, "required")
    advice = f"the default is {default}" if default != "required" else "change it"
    if expected.startswith("text") and isinstance(value, bool | int | float):
        advice = "put it in quotes"
    elif choices and isinstance(value, str):
        advice = f"the nearest is {nearest(value, [str(one) for one in choices])!r}"
    return f"{who} sets '{key}' to {'null' if value is None else repr(value)}, but {expected} is needed; {advice}"


def _kinds(hint: Any) -> str:
    or_null = NoneType in get_args(hint) or NoneType in get_args(_bare(hint))
    return f"one of {', '.join(map(kind_of, sections(hint)))}" + (" or null" if or_null else "")


def _choices(hint: Any) -> Iterator[Any]:
    if get_origin(hint) is Literal:
        yield from get_args(hint)
    elif get_origin(hint) in (Union, UnionType, Annotated):
        yield from (one for member in get_args(hint) for one in _choices(member))


def plain(value: Any) -> Any:
    """What YAML can write: lists for tuples, text for paths."""
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def _shown(value: Any) -> str:
    if value is MISSING:
        return "required"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(plain(value))
