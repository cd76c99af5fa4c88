"""One line of the table of commands, and the words that several commands accept."""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from rpo.errors import InputError


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
    preset: str = ""
    """Name of the file that is laid over its defaults; see `rpo config`."""

    @property
    def config_class(self) -> Any:
        """That class, imported when it is asked for."""
        module, _, name = self.config.partition(":")
        return vars(import_module(module))[name]


def takes_overrides(parser: argparse.ArgumentParser) -> None:
    """Declare `key=value` words."""
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="a setting to change, such as seed=1"
    )


def takes_run(parser: argparse.ArgumentParser) -> None:
    """Declare what a command accepts that makes a run in a folder."""
    takes_overrides(parser)
    parser.add_argument(
        "--resume", action="store_true", help="continue where an earlier run of the same output stopped"
    )
    parser.add_argument("--output", metavar="DIR", help="folder of the run; the same as output=DIR")


def takes_config(parser: argparse.ArgumentParser, *, is_run: bool = True) -> None:
    """Declare what a command accepts that makes a run of a file, or only looks at its settings."""
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG", help="YAML file of the run (see `rpo config`); none is all defaults"
    )
    if is_run:
        takes_run(parser)
    else:
        takes_overrides(parser)
        parser.set_defaults(output=None)


def overrides(args: argparse.Namespace) -> list[str]:
    """The `key=value` words, with --output as one of them; JSON quotes the folder for YAML."""
    return [*args.overrides, f"output={json.dumps(args.output)}"] if args.output else args.overrides


def config_and_overrides(args: argparse.Namespace) -> tuple[str | None, list[str]]:
    """The file among the words, which may stand anywhere or be left out, and the `key=value` words."""
    words = [*([args.config] if args.config else []), *overrides(args)]
    files = [word for word in words if "=" not in word or Path(word).is_file()]
    if len(files) > 1:
        raise InputError(
            f"got {' and '.join(files)}; expected one configuration and key=value words; leave out the rest"
        )
    return (files[0] if files else None), [word for word in words if word not in files]
