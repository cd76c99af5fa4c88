"""`rpo sample`: see what a checkpoint draws, and what a LoRA makes of it."""

import argparse
from pathlib import Path
from typing import get_args

from rpo.cli.command import Command
from rpo.models.config import DType


def sample(args: argparse.Namespace) -> None:
    """Draw images of prompts, with a contact sheet."""
    from rpo.models.config import ModelConfig
    from rpo.runs.sample import SHEET, draw_samples
    from rpo.runs.sample_wish import Wish

    model = ModelConfig(
        source=args.model,
        device=args.device,
        dtype=args.dtype,
        variant=args.variant,
        single_file_config=args.single_file_config,
    )
    folder = draw_samples(
        Wish(
            model,
            args.prompts,
            args.output,
            loras=args.lora,
            sweep=args.sweep,
            compare=args.compare,
            images=args.images,
            seed=args.seed,
            steps=args.steps,
            guidance=args.guidance,
            size=args.size,
            rewards=args.reward,
            best_of=args.best_of,
            draft_steps=args.draft_steps,
            looks=args.look_after,
        )
    )
    print(f"images: {folder}\nsheet:  {folder / SHEET}")


def takes_sample(parser: argparse.ArgumentParser) -> None:
    """Declare what `rpo sample` accepts."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder, hub id, single file, or shapes")
    add("--prompts", metavar="FILE|TEXT", required=True, help='file or source of prompts, or texts: "a fox;two dogs"')
    add("--lora", metavar="FILE[=STRENGTH]", action="append", default=[], help="LoRA to draw with (repeat for several)")
    add("--sweep", metavar="strength=FROM:TO:STEP", default="", help="a column for each strength of the LoRAs")
    add("--compare", metavar=("A", "B"), nargs=2, default=[], help="a column for each of two LoRAs, or one and base")
    add("--reward", metavar="NAME", action="append", default=[], help="score the images (repeat for several)")
    add("--best-of", metavar="N", type=count_from_one, help="of N seeds show the one that the first reward likes best")
    add(
        "--draft-steps",
        metavar="N",
        type=count_from_one,
        help="choose among drafts in so few steps, then draw the best one",
    )
    add(
        "--look-after",
        metavar="N,N",
        type=rising_steps,
        default=(),
        help="after so many steps drop the seeds that are clear and have no potential (--reward shapes-potential)",
    )
    add(
        "--images",
        metavar="N",
        type=count_from_one,
        help="of each prompt (default 4; 1 with --sweep, --compare, --best-of)",
    )
    add("--seed", metavar="N", type=int, default=0, help="of the first image of a prompt, and on (default 0)")
    add("--steps", metavar="N", type=count_from_one, help="denoising steps (default: the pipeline's own)")
    add("--guidance", metavar="SCALE", type=float, help="1 is none (default: the pipeline's own)")
    add("--size", metavar="HxW", default="", help="height and width in pixels, or one side (default: the model's)")
    add("--output", metavar="DIR", type=Path, default=Path("runs/sample"), help="new folder (default runs/sample)")
    takes_checkpoint(parser)


def takes_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Declare how a checkpoint is loaded."""
    add = parser.add_argument
    add("--device", metavar="NAME", default="auto", help="auto, cpu, cuda:1 … (default auto)")
    add("--dtype", choices=get_args(DType), default="float32", help="of the weights (default float32)")
    add("--variant", metavar="NAME", help="file variant, such as fp16")
    add("--single-file-config", metavar="PATH", help="for a single file: folder or hub id with its architecture")


def count_from_one(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 on")
    return int(text)


def rising_steps(text: str) -> tuple[int, ...]:
    """Steps with commas between them, such as 8,12,16."""
    return tuple(count_from_one(one.strip()) for one in text.split(","))


SAMPLE = {"sample": Command("draw images and see what a LoRA does: sheet, sweep, comparison", takes_sample, sample)}
"""The command, by name."""
