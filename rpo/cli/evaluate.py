"""`rpo evaluate`: say with intervals whether a LoRA is better, on the same prompts and noise."""

import argparse
from pathlib import Path

from rpo.cli.command import Command
from rpo.cli.sample import count_from_one, takes_checkpoint


def evaluate(args: argparse.Namespace) -> None:
    """Compare LoRAs with their base, and say what came of it."""
    from rpo.models.config import ModelConfig
    from rpo.runs.evaluate import evaluate as carry_out
    from rpo.runs.evaluate_report import in_words
    from rpo.runs.evaluate_wish import EvaluationWish

    wish = EvaluationWish(
        ModelConfig(
            source=args.model,
            device=args.device,
            dtype=args.dtype,
            variant=args.variant,
            single_file_config=args.single_file_config,
        ),
        args.rewards,
        args.output,
        prompts=args.prompts,
        count=args.count,
        categories=args.category,
        loras=args.lora,
        checkpoints=args.checkpoint,
        images_per_prompt=args.images_per_prompt,
        seed=args.seed,
        steps=args.steps,
        guidance=args.guidance,
        eta=args.eta,
        solver=args.solver,
        size=args.size,
        best_of=args.best_of,
        best_by=args.best_by,
        batch_size=args.batch_size,
    )
    found, page = carry_out(wish, resume=args.resume)
    print(f"{in_words(found)}\nnumbers: {args.output / 'evaluation.json'}\nreport:  {page}  (open it in a browser)")


def takes_evaluation(parser: argparse.ArgumentParser) -> None:
    """Declare what `rpo evaluate` accepts."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="the base: folder, hub id, single file, or shapes")
    add("--lora", metavar="FILE[=STRENGTH]", action="append", default=[], help="LoRA to compare (repeat for several)")
    add("--checkpoint", metavar="MODEL", action="append", default=[], help="whole checkpoint to compare (repeat)")
    rewards = "what judges; the first sorts the images of the page"
    add("--rewards", metavar="NAME", nargs="+", action="extend", required=True, default=[], help=rewards)
    sets = "general, shapes, words, a file, or FORM:PATH of parti, drawbench, geneval, t2i-compbench, hpd"
    add("--prompts", metavar="SET", default="general", help=f"{sets} (default general)")
    add("--count", metavar="N", type=count_from_one, help="prompts of each category, the first ones (default all)")
    add("--category", metavar="NAME", action="append", default=[], help="take this one alone (repeat; default all)")
    add("--images-per-prompt", metavar="N", type=count_from_one, default=1, help="more show diversity (default 1)")
    add("--best-of", metavar="N", type=count_from_one, help="compare with the best of N images of the base, too")
    add("--best-by", metavar="NAME", default="", help="the reward that chooses it; others judge (default the first)")
    add("--steps", metavar="N", type=count_from_one, help="denoising steps (default: the pipeline's own)")
    add("--guidance", metavar="SCALE", type=float, help="1 is none (default: the pipeline's own)")
    add("--eta", metavar="N", type=float, default=0.0, help="noise of the steps: 0 to 1 (default 0)")
    add("--solver", choices=("ddim", "dpm_solver"), default="ddim", help="default ddim; of a flow, Euler")
    add("--seed", metavar="N", type=int, default=0, help="of the noise, the same for all (default 0)")
    add("--size", metavar="HxW", default="", help="height and width in pixels, or one side (default: the model's)")
    add("--batch-size", metavar="N", type=count_from_one, help="images at once (default by size: 64 small ones)")
    add("--output", metavar="DIR", type=Path, default=Path("runs/evaluate"), help="folder (default runs/evaluate)")
    add("--resume", action="store_true", help="go on where an evaluation of the same command was killed")
    takes_checkpoint(parser)


EVALUATE = {"evaluate": Command("say with intervals whether a LoRA is better, by rewards", takes_evaluation, evaluate)}
"""The command, by name."""
