"""Settings: frozen dataclasses whose values are of the types they declare, whether Python or a file makes them.

Pydantic checks every field before the class's own `__post_init__`, strictly: a whole number passes for a number, a list
for a tuple, a path for text, and nothing else for what it is not. An error lists every wrong value at once.

A setting that was renamed stays in `renamed` of its class: the old key, from there, and what to give instead.
"""

import functools
import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from numbers import Integral, Real
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

from rpo.config.ranges import NotEmpty, Range
from rpo.errors import InputError
from rpo.from_environment import FromEnvironment
from rpo.plugins import nearest

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
        names = [one.name for one in fields(self)]
        named = dict(zip(names, args, strict=False))
        try:
            init(self, *args[len(names) :], **named, **given)
        except ValidationError as error:
            raise _told(error, type(self), named | given, lambda key: (key, type(self).__name__)) from None

    made.__init__ = checked
    return made


def checked(cls: type[Class], values: Any, source: Source) -> Class:
    """Settings of plain data; sections are mappings."""
    try:
        return cast(Any, cls).__pydantic_validator__.validate_python(values)
    except ValidationError as error:
        raise _told(error, cls, values, source) from None


def _text(value: Any, is_text: Callable[[Any], str]) -> str:
    text = is_text(os.fspath(value) if isinstance(value, os.PathLike) else value)
    return value if isinstance(value, FromEnvironment) else text


def _path(value: Any) -> Any:
    return Path(value) if isinstance(value, str | os.PathLike) else value


def _number(value: Any) -> Any:
    """Those of NumPy pass, too."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


_STRICT: dict[Any, Any] = {
    bool: Annotated[bool, Strict()],
    int: Annotated[int, Strict(), BeforeValidator(_number)],
    float: Annotated[float, Strict(), BeforeValidator(_number)],
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
    kind: str = ""
    """Of which kind the section must be for it to have the key."""
    choices: tuple[str, ...] = ()


def describe_fields(cls: Any, default: object = None) -> list[FieldInfo]:
    """Every key of a configuration class, with type, default and the docstring under the field, in source order.

    Args:
        default: An instance whose values are the defaults; None for those of the class.
    """
    described: list[FieldInfo] = []
    for one in fields(cls):
        hint, value = field_types(cls)[one.name], default_of(one, default)
        doc, members = _doc(cls, one.name), sections(hint)
        if not members:
            described.append(FieldInfo(one.name, type_name(hint), _shown(value), doc, "", _choices(hint)))
        kinds = tuple(map(kind_of, members)) if len(members) > 1 else ("",)
        if len(members) > 1:
            is_optional = NoneType in get_args(hint) or NoneType in get_args(get_args(hint)[0])
            name = f"one of {', '.join(kinds)}" + (" or null" if is_optional else "")
            shown = kind_of(type(value)) if is_dataclass(value) else _shown(value)
            described.append(FieldInfo(f"{one.name}.kind", name, shown, doc, "", kinds))
        for kind, member in zip(kinds, members, strict=False):
            for info in describe_fields(member, value if isinstance(value, member) else None):
                if not kind or info.key != "kind":
                    described.append(replace(info, key=f"{one.name}.{info.key}", kind=info.kind or kind))
    return described


def _sections_in(cls: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """A class and all classes within, by key."""
    yield key, cls
    for name, hint in field_types(cls).items():
        for one in sections(hint):
            yield from _sections_in(one, f"{key}{name}.")


def _doc(cls: Any, name: str) -> str:
    """The docstring under a field, wherever it is declared, on one line."""
    declared = (vars(one).get("__pydantic_fields__", {}).get(name) for one in cls.__mro__)
    return next((" ".join(one.description.split()) for one in declared if one and one.description), "")


def json_schema(cls: Any) -> dict[str, Any]:
    """What an editor needs to know of a configuration class, to help with its YAML."""
    schema = TypeAdapter(cls).json_schema()
    parts = {cls.__name__: schema, **schema.get("$defs", {})}
    for _, one in _sections_in(cls):
        for name, about in parts[one.__name__]["properties"].items():
            about["description"] = _doc(one, name)
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
    return TYPE_NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def _choices(hint: Any) -> tuple[str, ...]:
    if get_origin(hint) is Literal:
        return tuple(map(str, get_args(hint)))
    is_union = get_origin(hint) in (Union, UnionType, Annotated)
    return tuple(one for member in get_args(hint) if is_union for one in _choices(member))


@functools.cache
def _described(cls: Any) -> dict[str, list[FieldInfo]]:
    """Every key with what it is in each kind that has it."""
    found: dict[str, list[FieldInfo]] = {}
    for info in describe_fields(cls):
        found.setdefault(info.key, []).append(info)
    return found


def _told(error: ValidationError, cls: Any, values: Any, source: Source) -> InputError:
    """What is wrong, where it was set, what is needed and what to do: a line for each wrong key."""
    found: dict[str, str] = {}
    for one in error.errors(include_url=False):
        key, value, kind = _place(one["loc"], values)
        if own := str(one.get("ctx", {}).get("error", "")):  # a settings class refused its values together
            text = own
        elif one["type"] in ("unexpected_keyword_argument", "invalid_key"):
            text = _unknown(cls, key, kind, source)
        elif one["type"] == "missing" and isinstance(one["loc"][-1], str):
            key = f"{key}.{one['loc'][-1]}".removeprefix(".")
            text = f"{cls.__name__} needs {key}, which is not set; set it"
        else:
            if one["type"].startswith("union_tag"):
                key, value = f"{key}.kind", kind
            text = _mismatch(cls, key, value, kind, source)
        found.setdefault(key, text)
    # Of a value that may be of several types, the value as a whole counts.
    lines = [text for key, text in found.items() if not any(key.startswith(f"{other}[") for other in found)]
    return InputError(lines[0] if len(lines) == 1 else "\n- ".join((f"{len(lines)} settings are wrong:", *lines)))


def _place(loc: Sequence[int | str], values: Any) -> tuple[str, Any, Any]:
    """Key and value of an error, and the kind of the section there; which kind it tried does not count."""
    key, value, section = "", values, values
    for part in loc:
        if isinstance(value, Mapping) and part in value:
            key, section, value = f"{key}.{part}".removeprefix("."), value, value[part]
        elif isinstance(value, list | tuple) and isinstance(part, int) and part < len(value):
            key, value = f"{key}[{part}]", value[part]
    section = value if isinstance(value, Mapping) else section
    return key, value, section.get("kind")


def _unknown(cls: Any, short_key: str, kind: Any, source: Source) -> str:
    key, who = source(short_key)
    for place, section in _sections_in(cls):
        for old, advice in getattr(section, "renamed", {}).items():
            if f"{key}.".startswith(f"{place}{old}."):
                told = re.sub(r"it is (?=[\w.]+ now)", f"it is {place}", advice)
                return f"{who} sets '{key}', but {told}"
    if others := _described(cls).get(short_key):
        of, kinds = short_key.rpartition(".")[0], " and ".join(one.kind for one in others)
        return (
            f"{who} sets '{key}', but {of}.kind is {kind}, and it belongs to kind {kinds}; leave it out, or give "
            f"{of}.kind={others[0].kind}"
        )
    namesakes = [one for one in _described(cls) if one.rpartition(".")[2] == key.rpartition(".")[2]]
    near = namesakes[0] if len(namesakes) == 1 else nearest(key, namesakes or _described(cls))
    there = dict.fromkeys(one.partition(".")[0] for one in _described(cls))
    told = f"; the nearest is '{near}'" if near else f", and none like it; expected one of {', '.join(there)}"
    return f"{who} sets '{key}', but {cls.__name__} has no such key{told}"


def _mismatch(cls: Any, key: str, value: Any, kind: Any, source: Source) -> str:
    around = next((one for one in _described(cls) if key == one or key.startswith((f"{one}[", f"{one}."))), "")
    infos = _described(cls).get(around, [])
    info = next((one for one in infos if one.kind == kind), infos[0] if infos else None)
    advice, who = "change it", source(key)[1]
    if info is None:
        inner = [one.removeprefix(f"{key}.").partition(".")[0] for one in _described(cls) if one.startswith(f"{key}.")]
        expected = f"a section with keys {', '.join(dict.fromkeys(inner))}"
    elif item := re.search(r"\(each (.*)\)", info.type_name) if key != around else None:
        expected = item[1]
    else:
        expected = info.type_name
        advice = f"the default is {info.default}" if info.default != "required" else advice
    if expected.startswith("text") and isinstance(value, bool | int | float):
        advice = "put it in quotes"
    elif info and info.choices and isinstance(value, str):
        near = nearest(value, info.choices)
        advice = f"the nearest is {near!r}" if near else "give one of these"
    return f"{who} sets '{key}' to {'null' if value is None else repr(value)}, but {expected} is needed; {advice}"


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
