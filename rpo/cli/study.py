"""`rpo study`: which algorithm, with which reward, and how they scale; a grid of runs of equal cost, judged alike."""

import argparse

from rpo.cli.command import Command, config_and_overrides, takes_config
from rpo.errors import InputError


def study(args: argparse.Namespace) -> None:
    """Plan a study or, unless only its plan is asked for, run it."""
    from rpo.runs.study_process import on_its_own

    with on_its_own() as (number, _):
        from rpo.config.load import load_config
        from rpo.curation.records import Unavailable
        from rpo.runs.study import plan_in_words, planned
        from rpo.runs.study import study as carry_out
        from rpo.runs.study_config import StudyConfig

        config = load_config(StudyConfig, *config_and_overrides(args))
        if args.plan:
            print(plan_in_words(planned(config)))
            return
        say = (lambda words: print(f"{words}\n", flush=True)) if number == 0 else (lambda words: None)
        try:
            page = carry_out(config, resume=args.resume, number=number, say=say)
        except Unavailable as error:
            raise InputError(f"{error}; run the same command with --resume: what was found out is kept") from error
        say(f"report: {page}  (open it in a browser)")


def takes_study(parser: argparse.ArgumentParser) -> None:
    """Declare what `rpo study` accepts."""
    takes_config(parser)
    parser.add_argument("--plan", action="store_true", help="only say what would be run, and what it costs")


STUDY = {
    "study": Command(
        "which algorithm with which reward, and how they scale: a grid of runs of equal cost",
        takes_study,
        study,
        "rpo.runs.study_config:StudyConfig",
    )
}
"""The command, by name."""
