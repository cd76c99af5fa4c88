"""The command `rpo export`: a LoRA as the files that other programs read."""

import argparse
from pathlib import Path

from rpo.cli.command import Command


def export(args: argparse.Namespace) -> None:
    """Write the files and say what each is for."""
    from rpo.adapters.formats.export import export as write

    done = write(args.source, kind=args.format, rank=args.rank, base=args.base, output=args.output)
    for file in done.files:
        print(file)
    if done.error is not None:
        print(f"a LoRA of rank {args.rank} comes near it: off by {done.error:.2%} of the change")
    if done.is_verified:
        print(f"loaded back and compared on {args.base}: each draws as the LoRA does")
    else:
        print("not compared with the model; give --base MODEL to load each file back")


def takes_export(parser: argparse.ArgumentParser) -> None:
    """Declare what `rpo export` accepts."""
    parser.add_argument("source", metavar="RUN|LORA", type=Path, help="a run's folder, a LoRA of any program")
    parser.add_argument(
        "--format",
        choices=("diffusers", "peft", "kohya", "comfyui", "all"),
        help="what to write (default: what programs of the family read); A1111, Forge and ComfyUI read kohya's",
    )
    parser.add_argument("--rank", metavar="N", type=int, help="rank of a LoRA that is made of a DoRA or fine-tune")
    parser.add_argument("--base", metavar="MODEL", help="checkpoint that it belongs to, to compare the files on")
    parser.add_argument("--output", metavar="DIR", type=Path, help="folder to write (default: export, beside it)")


EXPORT = {
    "export": Command("write a LoRA as diffusers, peft, kohya's scripts and ComfyUI read it", takes_export, export)
}
"""The command, by name."""
