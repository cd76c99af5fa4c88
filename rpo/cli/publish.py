"""`rpo publish`: what a run came to, on the Hugging Face Hub; a plan first, an upload when asked for."""

import argparse
from pathlib import Path

from rpo.cli.command import Command


def publish(args: argparse.Namespace) -> None:
    """Say what would be uploaded, and upload it if asked."""
    from rpo.publishing.evaluated import add_evaluation
    from rpo.publishing.publish import CARD, publishable
    from rpo.publishing.publish import publish as carry_out

    folder = publishable(args.run_folder)
    if args.evaluation:
        add_evaluation(folder, args.evaluation)
    plan = carry_out(folder, args.repo, push=args.push, private=not args.public)
    print(plan)
    if not plan.url:
        print(f"the card, to be read first: {folder / CARD}")


def _takes_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="folder of a run that has ended, or of a LoRA with its card")
    parser.add_argument("--repo", metavar="OWNER/NAME", required=True, help="repository on the Hub")
    evaluation = "folder of `rpo evaluate` of this LoRA, whose numbers go into the card"
    parser.add_argument("--evaluation", metavar="DIR", type=Path, help=evaluation)
    parser.add_argument("--push", action="store_true", help="really upload; needs `hf auth login`; may be repeated")
    parser.add_argument("--public", action="store_true", help="make a new repository public; it is private otherwise")


PUBLISH = {
    "publish": Command("say what of a run would go to the Hugging Face Hub; --push uploads it", _takes_run, publish)
}
