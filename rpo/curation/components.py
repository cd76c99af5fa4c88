"""From the kind that a configuration names to the component."""

from collections.abc import Callable, Mapping
from typing import Any

from rpo.curation.records import Unavailable
from rpo.errors import InputError
from rpo.plugins import load_plugin


def make_component(config: Any, known: Mapping[str, str], what: str, *for_known: object) -> Any:
    """Make the component that a configuration describes.

    Args:
        config: What the component is made of. Its `kind` is a name among `known`, or "package.module:attribute"; its
            `model` is for messages.
        for_known: What the package's own are called with besides the configuration; one of your own is not.
    """
    make = find_component(config.kind, known, what)
    try:
        return make(config, *for_known) if config.kind in known else make(config)
    except (ValueError, OSError, ImportError, Unavailable):
        raise  # these say what is wrong
    except Exception as error:
        named = f"kind {config.kind!r}" + (f" and model {config.model!r}" if config.model else "")
        raise InputError(
            f"the {what} of {named} cannot be made ({type(error).__name__}: {error}); expected one that "
            "its configuration is enough for; look at its settings and whether its files are whole"
        ) from error


def find_component(kind: str, known: Mapping[str, str], what: str) -> Callable[..., Any]:
    """What makes a component of that kind."""
    found = load_plugin(kind, known, f"{what} of kind")
    if not callable(found):
        raise InputError(
            f"{what} {kind!r} is of type {type(found).__name__}; expected a class or function that takes the "
            "configuration; name that"
        )
    return found
