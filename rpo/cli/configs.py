"""`rpo config`: the configurations that come with the package, to start from, and what editors know them by.

They are the folder `configs` of the repository, which a wheel has inside the package.
"""

import argparse
import json
import textwrap
from pathlib import Path

from rpo.errors import InputError
from rpo.files.text import lines, read_text, write_text
from rpo.plugins import nearest


def configurations() -> dict[str, Path]:
    """The files by name; a YAML file is called without its ending."""
    package = Path(__file__).parents[1]
    folder = package / "configs"
    files = (folder if folder.is_dir() else package.parent / "configs").iterdir()
    return {file.name.removesuffix(".yaml"): file for file in sorted(files)}


def show_config(args: argparse.Namespace) -> None:
    """Print or write the one that is named, or the schema of a command's, or list all."""
    found = configurations()
    if args.name is None:
        print("\n".join(f"{name:24} {_summary(file)}" for name, file in found.items()))
        return
    text = _schema(" ".join(args.command_name)) if args.name == "schema" else _configuration(args, found)
    if args.output is None:
        print(text, end="")
    elif args.output.exists():
        raise InputError(f"{args.output} exists; expected a new file; give another --output, or remove it")
    elif not args.output.parent.is_dir():
        raise InputError(f"{args.output.parent} is no folder; expected one to write {args.output.name} in; make it")
    else:
        write_text(args.output, text)


def _configuration(args: argparse.Namespace, found: dict[str, Path]) -> str:
    name = " ".join([args.name.removesuffix(".yaml"), *args.command_name])
    if name not in found:
        raise InputError(
            f"there is no configuration {name!r}; expected a name that `rpo config` lists; the nearest is "
            f"{nearest(name, found)!r}"
        )
    return read_text(found[name])


def _schema(name: str) -> str:
    """The JSON schema of a command's configuration."""
    from rpo.cli.main import COMMANDS  # not at the top: it imports this
    from rpo.config.settings import json_schema

    known = [one for one, command in COMMANDS.items() if command.config]
    if name not in known:
        raise InputError(
            f"there is no command {name!r} with a configuration; expected one of {', '.join(known)}; the nearest is "
            f"{nearest(name, known)!r}"
        )
    return json.dumps(json_schema(COMMANDS[name].config_class), indent=2, ensure_ascii=False) + "\n"


def takes_name(parser: argparse.ArgumentParser) -> None:
    """Declare what `rpo config` accepts."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="which configuration, such as dpo_shapes; or schema")
    parser.add_argument(
        "command_name", nargs="*", metavar="COMMAND", help="after schema: whose, such as train dpo; for editors of YAML"
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help="file to write instead of printing")


def _summary(file: Path) -> str:
    """The first sentence of a file's comment."""
    comment = [line[1:].strip() for line in lines(read_text(file)) if line.startswith("#")]
    sentence = " ".join(comment).partition(". ")[0].partition("  ")[0].rstrip(".")
    return textwrap.shorten(sentence, 100, placeholder=" …") or "prompts, one a line"
