"""Configurations are nested settings; a YAML file and `a.b=value` overrides fill them, strictly.

OmegaConf reads YAML and dotlists and resolves `${...}`; the settings classes then decide what each value may be. What a
section leaves out is as in the default of the section around it.

A mapping of free names, such as the rewards of a run, is one value: who sets it replaces it whole. `rewards.NAME=1`
sets one name in the mapping that is in force. Who names another `kind` of a section begins that section anew: what a
file says of the objective dpo is nothing to `objective.kind=mapo`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from rpo.config.settings import checked, default_of, field_types, kind_of, plain, sections
from rpo.errors import InputError
from rpo.files.local_paths import without_paths, without_userinfo
from rpo.files.text import read_text
from rpo.from_environment import as_written, resolved

Config = TypeVar("Config")


def load_config(cls: type[Config], path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Build `cls` from its defaults, the YAML file at `path` and the `a.b=value` overrides, the later ones winning.

    Args:
        cls: A class under `@settings`.
        path: A YAML file; None for the defaults alone.
        overrides: Words such as `beta=80` or `learning.learning_rate=1e-4`; the value is read as YAML.

    Raises:
        InputError: Keys that `cls` does not have, values of another type, missing values, or text that is no YAML.
    """
    trees = [] if path is None else [(f"'{path}'", 0, _read_yaml(Path(path)))]
    for word in sorted(overrides, key=lambda one: not one.partition("=")[0].endswith(".kind")):
        depth = word.partition("=")[0].count(".") + 1
        trees.append((f"the override '{without_userinfo(word)}'", depth, _read_override(word)))
    given: Any = {}
    for _, depth, tree in trees:
        given = _laid_over(cls, given, tree, None, depth)
    try:
        values = resolved(cast(DictConfig, OmegaConf.create(given)))
    except OmegaConfBaseException as error:
        raise InputError(f"the configuration of {cls.__name__} does not resolve: {_one_line(error)}") from error
    source_of = {key: source for source, _, tree in trees for key in _leaf_keys(tree)}
    return checked(cls, _completed(cls, values, None), lambda key: _located(source_of, key))


def to_yaml(config: object, *, for_others: bool = False) -> str:
    """The YAML of a configuration, which `load_config` reads back; `for_others`, without the paths of this machine."""
    values = plain(as_written(asdict(cast(Any, config))))
    return OmegaConf.to_yaml(OmegaConf.create(without_paths(values) if for_others else values))


def differences(old: Any, new: Any, key: str = "") -> dict[str, str]:
    """What differs between two configurations of a class: "was OLD and is now NEW", by key."""
    if is_dataclass(old) and type(old) is type(new):
        pairs = ((f"{key}.{one.name}", getattr(old, one.name), getattr(new, one.name)) for one in fields(old))
        found = [differences(before, after, inner.removeprefix(".")) for inner, before, after in pairs]
        return {name: text for one in found for name, text in one.items()}
    is_equal = old == new and (not isinstance(old, Mapping) or list(old) == list(new))  # the first reward may lead
    return {} if is_equal else {key: f"was {plain(old)!r} and is now {plain(new)!r}"}


def _laid_over(hint: Any, under: Any, over: Any, default: Any, depth: int) -> Any:
    """What is set later on top of what was set before.

    Args:
        depth: How many names further an override goes; so far it reaches into mappings instead of replacing them.
    """
    members = sections(hint)
    if not isinstance(over, dict) or not (members or depth > 0):
        return over
    free = default if isinstance(default, Mapping) and not members else {}
    laid = dict(under if isinstance(under, dict) else free)
    if "kind" in over and over["kind"] != laid.get("kind", getattr(default, "kind", None)):
        laid = {}
    for name, value in over.items():
        inner, inner_default = _field(members, name, default)
        laid[name] = _laid_over(inner, laid.get(name), value, inner_default, depth - 1)
    return laid


def _completed(hint: Any, value: Any, default: Any) -> Any:
    """A section with what it leaves out: the values of `default`, unless that is of another kind."""
    members = sections(hint)
    if not members or not isinstance(value, dict):
        return value
    started = {}
    if is_dataclass(default) and value.get("kind") in (None, getattr(default, "kind", None)):
        started = {one.name: getattr(default, one.name) for one in fields(default)}
        members = (type(default),)
    elif len(members) > 1:
        members = tuple(one for one in members if kind_of(one) == value.get("kind"))
    for name, one in value.items():
        inner, inner_default = _field(members, name, default)
        started[name] = _completed(inner, one, inner_default)
    return started


def _field(members: tuple[Any, ...], name: Any, default: Any) -> tuple[Any, Any]:
    """Type and default of a field of the first member that has it."""
    for member in members:
        for one in fields(member):
            if one.name == name:
                value = default_of(one, default if isinstance(default, member) else None)
                return field_types(member)[name], None if value is MISSING else value
    return Any, None


def _located(source_of: Mapping[str, str], key: str) -> tuple[str, str]:
    """The full path that was set at, within or around `key`, and where: the file or the override."""
    within = [one for one in source_of if one == key or one.startswith(f"{key}.")]
    around = [one for one in source_of if key.startswith((f"{one}[", f"{one}."))]
    found = [*within, *around][:1]
    return (found[0], source_of[found[0]]) if found else (key, "the configuration")


def _read_yaml(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"there is no configuration file '{path}'; give the path of a YAML file")
    try:
        tree = OmegaConf.create(read_text(path))
    except (YAMLError, OmegaConfBaseException, OSError) as error:
        raise InputError(f"'{path}' cannot be read as YAML: {_one_line(error)}") from error
    if not OmegaConf.is_dict(tree):
        raise InputError(f"'{path}' holds a list, but a configuration is lines of `key: value`; write it so")
    return OmegaConf.to_container(tree)


def _read_override(word: str) -> Any:
    key, equals, _ = word.partition("=")
    shown = without_userinfo(word)
    if not (key.strip() and equals):
        raise InputError(f"the override '{shown}' is not of the form key=value; write for example seed=1")
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([word]))
    except (YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"the override '{shown}' cannot be read as YAML: {_one_line(error)}") from error


def _leaf_keys(tree: Any, prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaf_keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _one_line(error: Exception) -> str:
    return without_userinfo(" ".join(str(error).split()))
