"""Plug-ins: what a table names as "module:attribute", imported when it is asked for."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any


def plugged(table: Mapping[str, str], name: str) -> Any:
    """What the table has under a name."""
    module, _, attribute = table[name].partition(":")
    return getattr(import_module(module), attribute)
