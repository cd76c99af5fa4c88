"""`rpo config`: the configurations that come with the package, to start from.

They are the folder `configs` of the repository, which a wheel has inside the package.
"""

import argparse
import difflib
import textwrap
from pathlib import Path

from rpo.errors import InputError
from rpo.text import lines, read_text, write_text


def configurations() -> dict[str, Path]:
    """The files by name; a YAML file is called without its ending."""
    package = Path(__file__).parents[1]
    folder = package / "configs"
    files = (folder if folder.is_dir() else package.parent / "configs").iterdir()
    return {file.name.removesuffix(".yaml"): file for file in sorted(files)}


def show_config(args: argparse.Namespace) -> None:
    """Print or write the one that is named, or list all."""
    found = configurations()
    if args.name is None:
        print("\n".join(f"{name:24} {_summary(file)}" for name, file in found.items()))
        return
    name = args.name.removesuffix(".yaml")
    if name not in found:
        nearest = difflib.get_close_matches(name, found, n=1, cutoff=0)
        raise InputError(
            f"there is no configuration {name!r}; expected a name that `rpo config` lists; the nearest is "
            f"{nearest[0]!r}"
        )
    if args.output is None:
        print(read_text(found[name]), end="")
    elif args.output.exists():
        raise InputError(f"{args.output} exists; expected a new file; give another --output, or remove it")
    else:
        write_text(args.output, read_text(found[name]))


def takes_name(parser: argparse.ArgumentParser) -> None:
    """Declare what `rpo config` accepts."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="which configuration, such as dpo_shapes")
    parser.add_argument("--output", metavar="FILE", type=Path, help="file to write instead of printing")


def _summary(file: Path) -> str:
    """The first sentence of a file's comment."""
    comment = [line[1:].strip() for line in lines(read_text(file)) if line.startswith("#")]
    sentence = " ".join(comment).partition(". ")[0].partition("  ")[0].rstrip(".")
    return textwrap.shorten(sentence, 100, placeholder=" …") or "prompts, one a line"
