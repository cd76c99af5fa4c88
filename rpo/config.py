"""Configurations are nested frozen dataclasses; a YAML file and `a.b=value` overrides fill them, strictly.

OmegaConf reads YAML and dotlists, merges them and resolves `${...}`; the dataclass's own type hints then decide what
each value may be. An unknown key and a wrong type are errors that say where the value stands and what was meant.

A mapping of free names, such as the rewards of a run, is one value: who sets it replaces it whole. `rewards.NAME=1`
sets one name in the mapping that is in force.
"""

import ast
import difflib
import inspect
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from rpo.errors import InputError
from rpo.from_environment import as_written, resolved
from rpo.local_paths import without_paths, without_userinfo
from rpo.settings import WrongTypeError, as_type, field_types, type_name
from rpo.text import read_text

Config = TypeVar("Config")


@dataclass(frozen=True)
class FieldInfo:
    """One line of a configuration's help: a key and what it means."""

    key: str
    type_name: str
    default: str
    doc: str


def load_config(cls: type[Config], path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Build `cls` from its defaults, the YAML file at `path` and the `a.b=value` overrides, the later ones winning.

    Args:
        cls: A dataclass of plain values, paths, literals, lists, tuples, dicts, other dataclasses, and unions of them.
        path: A YAML file; None for the defaults alone.
        overrides: Words such as `beta=80` or `loop.learning_rate=1e-4`; the value is read as YAML.

    Raises:
        ValueError: A key that `cls` does not have, a value of another type, a missing value, or text that is no YAML.
    """
    trees = [] if path is None else [(f"'{path}'", "", _read_yaml(Path(path)))]
    for word in overrides:
        trees.append((f"the override '{without_userinfo(word)}'", word.partition("=")[0].strip(), _read_override(word)))
    source_of = {key: source for source, _, tree in trees for key in _leaf_keys(tree)}
    try:
        values = resolved(_merged(cls, [(name, tree) for _, name, tree in trees]))
    except OmegaConfBaseException as error:
        raise InputError(f"the configuration of {cls.__name__} does not resolve: {_one_line(error)}") from error
    return _Builder(cls, source_of).dataclass(cls, values, "")


def to_yaml(config: object, *, for_others: bool = False) -> str:
    """The YAML of a configuration, which `load_config` reads back; `for_others`, without the paths of this machine."""
    values = _plain(as_written(asdict(cast(Any, config))))
    return OmegaConf.to_yaml(OmegaConf.create(without_paths(values) if for_others else values))


def differences(old: Any, new: Any, key: str = "") -> dict[str, str]:
    """What differs between two configurations of a class: "was OLD and is now NEW", by key."""
    if is_dataclass(old) and type(old) is type(new):
        pairs = ((_join(key, one.name), getattr(old, one.name), getattr(new, one.name)) for one in fields(old))
        return {name: text for one, before, after in pairs for name, text in differences(before, after, one).items()}
    is_equal = old == new and (not isinstance(old, Mapping) or list(old) == list(new))  # the first reward may lead
    return {} if is_equal else {key: f"was {_plain(old)!r} and is now {_plain(new)!r}"}


def describe_fields(cls: type, default: object = None) -> list[FieldInfo]:
    """Every key of a configuration class, with type, default and the docstring under the field, in source order.

    Args:
        default: An instance whose values are the defaults; None for those of the class.
    """
    docs = _field_docs(cls)
    described: list[FieldInfo] = []
    for field, hint in _hints(cls):
        value = _default(field, default)
        if nested := _section(hint):
            for inner in describe_fields(nested, value if is_dataclass(value) else None):
                described.append(FieldInfo(f"{field.name}.{inner.key}", inner.type_name, inner.default, inner.doc))
        else:
            shown = "required" if value is MISSING else _yaml_value(value)
            described.append(FieldInfo(field.name, type_name(hint), shown, docs.get(field.name, "")))
    return described


@dataclass(frozen=True)
class _Builder:
    """Makes typed values out of plain ones; knows where each key was set, so that its errors can say so."""

    root: type
    source_of: Mapping[str, str]

    def dataclass(self, cls: type[Config], value: Any, key: str, default: object = None) -> Config:
        """One section, from a mapping of its keys; what they leave out is as in `default`, or as the class has it."""
        if not isinstance(value, Mapping):
            raise self.mismatch(key, value, type_name(cls))
        hints = {field.name: (field, hint) for field, hint in _hints(cls)}
        for name in value:
            if name not in hints:
                raise self.unknown(_join(key, name))
        for name, (field, _) in hints.items():
            if name not in value and _default(field, default) is MISSING:
                raise InputError(f"{self.root.__name__} needs {_join(key, name)}, which is not set; set it")
        built: dict[str, Any] = {}
        for name, one in value.items():
            field, hint = hints[name]
            built[name] = self.value(hint, one, _join(key, name), _default(field, default))
        return replace(cast(Any, default), **built) if isinstance(default, cls) else cls(**built)

    def value(self, hint: Any, value: Any, key: str, default: object = None) -> Any:
        """One value of the type that `hint` asks for; `default` is what a section starts from."""
        section = _section(hint)
        if section is not None and not (value is None and section is not hint):
            return self.dataclass(section, value, key, default)
        try:
            return as_type(hint, value)
        except WrongTypeError as wrong:
            raise self.mismatch(key + wrong.place, wrong.value, wrong.expected) from None

    def unknown(self, key: str) -> InputError:
        """The error for a key that the configuration does not have."""
        full_key, source = self.locate(key)
        last = full_key.rpartition(".")[2]
        keys = [info.key for info in describe_fields(self.root)]
        namesakes = [one for one in keys if one.rpartition(".")[2] == last]
        nearest = difflib.get_close_matches(full_key, namesakes or keys, n=1, cutoff=0)
        return InputError(
            f"{source} sets '{full_key}', but {self.root.__name__} has no such key; the nearest is '{''.join(nearest)}'"
        )

    def mismatch(self, key: str, value: Any, expected: str) -> InputError:
        """The error for a value of the wrong type."""
        _, source = self.locate(key)
        defaults = {info.key: info.default for info in describe_fields(self.root)}
        advice = f"the default is {defaults[key]}" if key in defaults else "change it"
        if expected.startswith("text") and isinstance(value, bool | int | float):
            advice = "put it in quotes"
        shown = "null" if value is None else repr(value)
        return InputError(f"{source} sets '{key}' to {shown}, but {expected} is needed; {advice}")

    def locate(self, key: str) -> tuple[str, str]:
        """The full path that was set at, within or around `key`, and where: the file or the override."""
        for full_key, source in self.source_of.items():
            if full_key == key or full_key.startswith(f"{key}."):
                return full_key, source
        around = [full_key for full_key in self.source_of if key.startswith((f"{full_key}[", f"{full_key}."))]
        return (around[0], self.source_of[around[0]]) if around else (key, "the configuration")


def _read_yaml(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"there is no configuration file '{path}'; give the path of a YAML file")
    try:
        tree = OmegaConf.create(read_text(path))
    except (YAMLError, OmegaConfBaseException, OSError) as error:
        raise InputError(f"'{path}' cannot be read as YAML: {_one_line(error)}") from error
    if not OmegaConf.is_dict(tree):
        raise InputError(f"'{path}' holds a list, but a configuration is lines of `key: value`; write it so")
    return tree


def _read_override(word: str) -> Any:
    key, equals, _ = word.partition("=")
    shown = without_userinfo(word)
    if not (key.strip() and equals):
        raise InputError(f"the override '{shown}' is not of the form key=value; write for example seed=1")
    try:
        return OmegaConf.from_dotlist([word])
    except (YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"the override '{shown}' cannot be read as YAML: {_one_line(error)}") from error


def _merged(cls: type, trees: Iterable[tuple[str, DictConfig]]) -> DictConfig:
    """All trees in one, the later ones winning; each comes with the key of its override, or nothing for a file."""
    merged = OmegaConf.create({})
    for name, tree in trees:
        for key, default in _mappings(cls):
            if not _holds(tree, key):
                continue
            if not name.startswith(f"{key}."):
                OmegaConf.update(merged, key, {}, merge=False)
            elif not _holds(merged, key):
                OmegaConf.update(merged, key, dict(default))
        merged = cast(DictConfig, OmegaConf.merge(merged, tree))
    return merged


def _mappings(cls: Any, default: object = None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The key of every mapping of free names, and what it is by default."""
    for field, hint in _hints(cls):
        value = _default(field, default)
        if nested := _section(hint):
            yield from ((f"{field.name}.{key}", one) for key, one in _mappings(nested, value))
        elif any(get_origin(one) in (dict, Mapping) for one in (hint, *get_args(hint))):
            yield field.name, value if isinstance(value, Mapping) else {}


def _holds(tree: DictConfig, key: str) -> bool:
    node: Any = tree
    for name in key.split("."):
        if not OmegaConf.is_dict(node) or name not in node.keys():  # noqa: SIM118 - `in` does not see a null
            return False
        node = node._get_node(name)
    return True


def _leaf_keys(tree: Any, prefix: str = "") -> Iterator[str]:
    for name, value in tree.items_ex(resolve=False) if OmegaConf.is_dict(tree) else ():
        if OmegaConf.is_dict(value) and len(value) > 0:
            yield from _leaf_keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _hints(cls: Any) -> list[tuple[Field[Any], Any]]:
    return [(field, field_types(cls)[field.name]) for field in fields(cls)]


def _section(hint: Any) -> type | None:
    """The dataclass that a hint names, alone or beside None."""
    return next(
        (member for member in (hint, *get_args(hint)) if is_dataclass(member) and isinstance(member, type)), None
    )


def _field_docs(cls: type) -> dict[str, str]:
    """The string literals under the fields of a class, each on one line."""
    docs = _field_docs(cls.__base__) if is_dataclass(cls.__base__) else {}
    body = cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]).body
    for statement, below in zip(body, body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            match below:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    docs[statement.target.id] = " ".join(text.split())
                case _:
                    pass
    return docs


def _default(field: Field[Any], instance: object = None) -> Any:
    """What a field is when nobody sets it: as in `instance`, or as its class says; MISSING if it must be set."""
    if is_dataclass(instance):
        return getattr(instance, field.name)
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _yaml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(_plain(value))


def _plain(value: Any) -> Any:
    """What YAML can write: lists for tuples, text for paths."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _one_line(error: Exception) -> str:
    return without_userinfo(" ".join(str(error).split()))
