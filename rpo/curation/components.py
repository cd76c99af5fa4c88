"""From the kind that a configuration names to the thing that makes such a component."""

import difflib
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def find_component(kind: str, known: Mapping[str, str], what: str) -> Callable[..., Any]:
    """What makes a component of that kind.

    Args:
        kind: A name among `known`, or "package.module:attribute".
        known: Names and their places.
        what: What messages call the component, such as "critic".

    Raises:
        ValueError: There is no such kind, module or attribute, or it cannot be called.
    """
    if kind not in known and ":" not in kind:
        nearest = difflib.get_close_matches(kind, known, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"there is no {what} of kind {kind!r}; expected one of {', '.join(known)}, or package.module:attribute; "
            f"the nearest is {nearest!r}"
        )
    module_name, _, attribute = known.get(kind, kind).partition(":")
    try:
        found = vars(import_module(module_name))[attribute]
    except (ImportError, KeyError, ValueError) as error:
        raise ValueError(
            f"{what} {kind!r} cannot be imported ({type(error).__name__}: {error}); expected package.module:attribute "
            "of something installed; install it, or put its folder on PYTHONPATH"
        ) from error
    if not callable(found):
        raise ValueError(
            f"{what} {kind!r} is of type {type(found).__name__}; expected a class or function that takes the "
            "configuration; name that"
        )
    return found
