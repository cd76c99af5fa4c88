"""A table of names that stand for things in modules, imported when they are asked for; or a person's own module:name.

Rewards, critics, instructors, judges and editors are such tables. A new one is a line in its table.
"""

import difflib
from collections.abc import Collection, Mapping
from importlib import import_module
from typing import Any

from rpo.errors import InputError


def nearest(name: str, names: Collection[str]) -> str | None:
    """The one of several names that is written most like `name`; None if none is much like it.

    Example:
        >>> nearest("mapp", ["dpo", "mapo"]), nearest("pixels", ["dpo", "mapo"])
        ('mapo', None)
    """
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.5)), None)


def in_words(near: str | None) -> str:
    """The end of a message that has named what there is."""
    return f"; the nearest is {near!r}" if near else ""


def place_of(name: str, known: Mapping[str, str], what: str) -> str:
    """Where a thing is, as "package.module:attribute"; a name is one of `known`, or such a place itself."""
    if name not in known and ":" not in name:
        raise InputError(
            f"there is no {what} {name!r}; expected one of {', '.join(known)}, or package.module:attribute"
            f"{in_words(nearest(name, known))}"
        )
    return known.get(name, name)


def load_plugin(name: str, known: Mapping[str, str], what: str) -> Any:
    """What a name or a place stands for; `what` is what a person calls these things."""
    module_name, _, attribute = place_of(name, known, what).partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise InputError(
            f"{what} {name!r} is no place in a module; expected package.module:attribute; name a module that Python "
            "can import, not a file"
        )
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise InputError(
            f"{what} {name!r} cannot be imported ({error}); expected a module that can; install what it needs, or put "
            "its folder on PYTHONPATH"
        ) from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise InputError(
            f"{what} {name!r}: module {module_name!r} has no {attribute!r}; expected the name of something in it"
            f"{in_words(nearest(attribute, vars(module)))}"
        ) from error
