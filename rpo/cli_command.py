"""One line of the table of commands."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One line of the table: what a command is for, what it accepts, what it does."""

    summary: str
    """One line for the help."""
    add_arguments: Callable[[argparse.ArgumentParser], None]
    """Declares what it accepts."""
    run: Callable[[argparse.Namespace], int | None]
    """Does it, and returns the exit code; nothing is 0."""
    config: str = ""
    """`module:class` of the configuration that `key=value` words fill; its keys are listed in the help."""
