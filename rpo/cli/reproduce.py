"""`rpo reproduce`: run again what a folder holds, and say whether the weights are equal."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from rpo.cli.command import Command


def reproduce(args: argparse.Namespace) -> int:
    """Say what is different now, run, and compare; 1 if the weights differ, or with --check anything."""
    from rpo.runs.reproduce import compare
    from rpo.runs.reproduce import reproduce as run_again

    if args.check:
        _tell(found := compare(args.run_folder))
        return int(bool(found))
    again = run_again(args.run_folder, args.output, tell=_tell)
    print(f"second run: {again.folder}")
    if not again.unequal:
        print("equal weights")
        return 0
    print("other weights:")
    for name, distance in again.unequal.items():
        print(f"  {name} differs {distance}")
    _tell(again.different)
    return 1


def _tell(different: Mapping[str, str]) -> None:
    if not different:
        print("nothing that is kept of the run is different now")
        return
    print("different now:", *(f"  {name} {change}" for name, change in different.items()), sep="\n", flush=True)


def takes_reproduce(parser: argparse.ArgumentParser) -> None:
    """Declare what `rpo reproduce` accepts."""
    parser.add_argument(
        "run_folder", metavar="RUN", type=Path, help="folder of a finished run of train, align, quickstart"
    )
    parser.add_argument("--output", metavar="DIR", type=Path, help="new folder (default RUN-reproduced)")
    parser.add_argument("--check", action="store_true", help="only say what is different now; run nothing")


REPRODUCE = {
    "reproduce": Command("run again what a folder holds; equal weights, or what differs", takes_reproduce, reproduce)
}
"""The command, by name."""
