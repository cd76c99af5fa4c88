"""`rpo config`: the configurations and examples that come with the package, and what editors know of the first.

They are the folders `configs` and `examples` of the repository, which a wheel has inside the package. `rpo skill` gives
what a coding agent should read first.
"""

import argparse
import ast
import json
import textwrap
from pathlib import Path

from rpo.cli.command import Command
from rpo.errors import InputError
from rpo.files.text import lines, read_text, write_text
from rpo.plugins import nearest

PACKAGE = Path(__file__).parents[1]


def configurations() -> dict[str, Path]:
    """The configurations by name; a YAML file is called without its ending."""
    return {file.name.removesuffix(".yaml"): file for file in sorted(_folder("configs").iterdir())}


def examples() -> dict[str, Path]:
    """The example scripts and notebooks by name, with their endings."""
    folder = _folder("examples")
    found = [*folder.glob("*.py"), *folder.glob("notebooks/*.ipynb")] if folder.is_dir() else []
    return {file.name: file for file in sorted(found, key=lambda file: file.name)}


def _folder(name: str) -> Path:
    """A folder that lies beside the package in a clone, and inside it in a wheel."""
    return PACKAGE / name if (PACKAGE / name).is_dir() else PACKAGE.parent / name


def list_configs(args: argparse.Namespace) -> None:
    """One line for each."""
    for name, file in (configurations() | examples()).items():
        print(f"{name:24} {_summary(file)}")


def show_config(args: argparse.Namespace) -> None:
    """Print or write the one that is named."""
    file = _named(args.name)
    if args.output is None:
        print(read_text(file), end="")
    else:
        _write(args.output, read_text(file))


def copy_config(args: argparse.Namespace) -> None:
    """Write the one that is named to a file of its name, or to another."""
    file, place = _named(args.name), args.path or Path()
    place = place / file.name if place.is_dir() else place
    _write(place, read_text(file))
    print(place)


def show_schema(args: argparse.Namespace) -> None:
    """Print or write the schema of a command's configuration."""
    text = _schema(" ".join(args.command_name))
    if args.output is None:
        print(text, end="")
    else:
        _write(args.output, text)


def skill(args: argparse.Namespace) -> None:
    """Print the file for coding agents, or where it is."""
    file = PACKAGE / "SKILL.md"
    print(file if args.path else read_text(file), end="\n" if args.path else "")


def _write(file: Path, text: str) -> None:
    if file.exists():
        raise InputError(f"{file} exists; expected a new file; give another, or remove it")
    if not file.parent.is_dir():
        raise InputError(f"{file.parent} is no folder; expected one to write {file.name} in; make it")
    write_text(file, text)


def _named(name: str) -> Path:
    found = configurations() | examples()
    name = name.removesuffix(".yaml")
    if name not in found:
        raise InputError(
            f"there is no configuration {name!r}; expected a name that `rpo config list` lists; the nearest is "
            f"{nearest(name, found)!r}"
        )
    return found[name]


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


def _takes_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="which one of `rpo config list`, such as dpo_shapes")


def takes_shown(parser: argparse.ArgumentParser) -> None:
    """Declare what `rpo config show` accepts."""
    _takes_name(parser)
    _takes_output(parser)


def takes_copied(parser: argparse.ArgumentParser) -> None:
    """Declare what `rpo config copy` accepts."""
    _takes_name(parser)
    parser.add_argument("path", nargs="?", metavar="PATH", type=Path, help="file or folder (default: its name, here)")


def takes_schema(parser: argparse.ArgumentParser) -> None:
    """Declare what `rpo config schema` accepts."""
    parser.add_argument("command_name", nargs="+", metavar="COMMAND", help="whose, such as train dpo")
    _takes_output(parser)


def takes_skill(parser: argparse.ArgumentParser) -> None:
    """Declare what `rpo skill` accepts."""
    parser.add_argument("--path", action="store_true", help="print where the file is instead")


def _takes_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", metavar="FILE", type=Path, help="file to write instead of printing")


def _summary(file: Path) -> str:
    """The first sentence of what a file says of itself."""
    text = read_text(file)
    if file.suffix == ".py":
        comment = (ast.get_docstring(ast.parse(text)) or "").split()
    elif file.suffix == ".ipynb":
        comment = "".join(json.loads(text)["cells"][0]["source"]).lstrip("# ").split("\n")[:1]
    else:
        comment = [line[1:].strip() for line in lines(text) if line.startswith("#")]
    sentence = " ".join(comment).partition(". ")[0].partition("  ")[0].rstrip(".")
    return textwrap.shorten(sentence, 100, placeholder=" …") or "prompts, one a line"


CONFIG = {
    "config list": Command("what there is to start from: configurations and examples", lambda _: None, list_configs),
    "config show": Command("print one; `rpo config NAME` is the same", takes_shown, show_config),
    "config copy": Command("write one to a file of your own", takes_copied, copy_config),
    "config schema": Command(
        "print the JSON schema of a command's configuration, for editors of YAML",
        takes_schema,
        show_schema,
    ),
    "skill": Command("print what a coding agent should read to align a pipeline with rpo", takes_skill, skill),
}
"""The commands, by name."""
