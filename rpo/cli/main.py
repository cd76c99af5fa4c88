"""The `rpo` command: a table of commands, each a few lines that load a configuration and call the library.

A handler imports what it needs when it runs, so that `rpo --help` answers at once. A mistake in the input ends in one
line on stderr and exit code 2; its traceback is shown under `--debug`. Anything else is a defect of rpo and shows its
traceback.
"""

import argparse
import io
import os
import sys
import textwrap
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rpo import __version__
from rpo.cli.command import Command, config_and_overrides, overrides, takes_config, takes_run
from rpo.cli.configs import CONFIG, configurations
from rpo.cli.curate import CURATE
from rpo.cli.evaluate import EVALUATE
from rpo.cli.export import EXPORT
from rpo.cli.publish import PUBLISH
from rpo.cli.reproduce import REPRODUCE
from rpo.cli.sample import SAMPLE
from rpo.cli.serve import SERVE
from rpo.cli.study import STUDY
from rpo.errors import SURROUNDINGS, InputError
from rpo.interrupts import Terminated, ended_in_order

ALGORITHMS = {
    "dpo": ("DPORunConfig", "learn from preference pairs: Diffusion-DPO and its family"),
    "grpo": ("GRPORunConfig", "learn from a reward by comparing images of a prompt: GRPO or DDPO"),
    "score-as-action": ("ScoreAsActionRunConfig", "learn from a reward by continuous-time policy gradients"),
    "endpoint": ("EndpointRunConfig", "learn from a reward by the likelihood of whole images, from any solver"),
    "reward-gradient": ("RewardGradientRunConfig", "learn along the gradient of a reward that is differentiable"),
}
"""What `rpo train` trains by: the class of its settings in `rpo.runs.train_config`, and what it is."""


def train(settings: str, args: argparse.Namespace) -> None:
    """Train what a YAML file describes."""
    from rpo.config.load import load_config
    from rpo.runs import train_config
    from rpo.runs.train import run

    run(load_config(getattr(train_config, settings), *config_and_overrides(args)), resume=args.resume)


def plan(settings: str, args: argparse.Namespace) -> None:
    """Say what such a run would need."""
    from rpo.config.load import load_config
    from rpo.runs import plan as planning
    from rpo.runs import train_config

    config = load_config(getattr(train_config, settings), *config_and_overrides(args))
    if args.memory is None:
        print(planning.plan(config, processes=args.processes))
    else:
        changes, found = planning.to_fit(config, planning.bytes_of(args.memory), processes=args.processes)
        print(f"{found}\n\nto fit {args.memory}: {', '.join(changes) or 'nothing to change'}")


def doctor(settings: str, args: argparse.Namespace) -> int:
    """Look for everything that is wrong with such a run; 1 if something is."""
    from rpo.config.load import load_config
    from rpo.runs import train_config
    from rpo.runs.doctor import doctor as examine

    found = examine(lambda: load_config(getattr(train_config, settings), *config_and_overrides(args)))
    return int(not all(check.passed for check in found))


def align(args: argparse.Namespace) -> None:
    """Go through rounds of curation and training."""
    _align(*config_and_overrides(args), resume=args.resume)


def quickstart(args: argparse.Namespace) -> None:
    """One such round on the embedded checkpoint."""
    _align(configurations()[args.command.preset], overrides(args), resume=args.resume)


def _align(path: Path | str | None, words: list[str], *, resume: bool) -> None:
    from rpo.config.load import load_config
    from rpo.curation.records import Unavailable
    from rpo.runs.align import align as run_rounds
    from rpo.runs.align_config import AlignConfig

    try:
        result = run_rounds(load_config(AlignConfig, path, words), resume=resume)
    except Unavailable as error:
        raise InputError(f"{error}; run the same command with --resume: what was found out is kept") from error
    print(f"LoRA:   {result.lora}\nreport: {result.report}  (open it in a browser)")


def data_check(args: argparse.Namespace) -> int:
    """Read a pair set and say what it is; 1 if it cannot be trained on."""
    from rpo.data.check import check_pairs, format_report

    report = check_pairs(args.path, split=args.split, model=args.model, buckets=args.buckets)
    print(format_report(report))
    return 0 if report.is_trainable else 1


def shapes_evaluate(args: argparse.Namespace) -> None:
    """Measure the embedded model, with or without a LoRA, by its verifier."""
    from rpo.shapes.evaluate import evaluate_shapes, format_accuracies

    print(format_accuracies(evaluate_shapes(lora=args.lora, images=args.images, seed=args.seed)))


def _takes_pairs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="folder, file or hub id of a pair set")
    parser.add_argument("--split", metavar="NAME", default="train", help="of a set with several (default train)")
    parser.add_argument("--model", metavar="PATH", help="checkpoint (folder, id, shapes) whose cut captions count")
    help_of_buckets = "side and bucket_step of a run whose buckets are told, such as 1024 64"
    parser.add_argument("--buckets", metavar=("SIDE", "STEP"), type=int, nargs=2, help=help_of_buckets)


def _takes_plan(parser: argparse.ArgumentParser) -> None:
    takes_config(parser, is_run=False)
    parser.add_argument("--memory", metavar="SIZE", help="what there is, such as 24GB: say what to change to fit")
    help_of_processes = "that share one denoiser, of which the memory of one is told (learning.sharding)"
    parser.add_argument("--processes", metavar="N", type=int, default=1, help=help_of_processes)


def _takes_evaluation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lora", metavar="PATH", type=Path, help="LoRA to load into the embedded model")
    parser.add_argument("--images", metavar="N", type=int, default=400, help="images per split (default 400)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the initial noise (default 0)")


COMMANDS = {
    "quickstart": Command(
        "align the embedded model on this machine and write a report",
        takes_run,
        quickstart,
        "rpo.runs.align_config:AlignConfig",
        preset="quickstart",
    ),
    **{
        f"train {name}": Command(summary, takes_config, partial(train, cls), f"rpo.runs.train_config:{cls}")
        for name, (cls, summary) in ALGORITHMS.items()
    },
    **{
        f"plan {name}": Command(
            f"what a run of `rpo train {name}` needs, before any weight is read",
            _takes_plan,
            partial(plan, cls),
            f"rpo.runs.train_config:{cls}",
        )
        for name, (cls, _) in ALGORITHMS.items()
    },
    **{
        f"doctor {name}": Command(
            f"say what is wrong with a run of `rpo train {name}`, in under a minute; trains nothing",
            partial(takes_config, is_run=False),
            partial(doctor, cls),
            f"rpo.runs.train_config:{cls}",
        )
        for name, (cls, _) in ALGORITHMS.items()
    },
    **CURATE,
    **PUBLISH,
    **SAMPLE,
    **EVALUATE,
    **SERVE,
    **REPRODUCE,
    "align": Command(
        "rounds of drawing, curating and training: Rich Preference Optimization from end to end",
        takes_config,
        align,
        "rpo.runs.align_config:AlignConfig",
    ),
    **STUDY,
    **CONFIG,
    **EXPORT,
    "data check": Command("say what a pair set holds and what is wrong with it", _takes_pairs, data_check),
    "shapes evaluate": Command(
        "measure the embedded model, or a LoRA of it, by its verifier", _takes_evaluation, shapes_evaluate
    ),
}

GROUPS = {
    "train": "train a checkpoint",
    "plan": "parameters, memory, disk and cost of a run, before any weight is read",
    "doctor": "all that is wrong with a run, a line each with its remedy, before it is started",
    "curate": "make preference pairs that say why; `rpo curate CONFIG` is `rpo curate run CONFIG`",
    "config": "configurations and examples that come with rpo; `rpo config NAME` is `rpo config show NAME`",
    "data": "look at preference data",
    "shapes": "the embedded model",
}

DEFAULTS = {"curate": "run", "config": "show"}
"""What a group does when none of its commands is named: `rpo curate CONFIG` is `rpo curate run CONFIG`."""

ALONE = {"config": "list"}
"""What a group does when nothing follows it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` names.

    Args:
        argv: The words after `rpo`; None for those of this process.

    Returns:
        The exit code: 0, 1 for an untrainable set or a run with a fault, 2 for wrong input, 130 by Ctrl-C, 143 by
        SIGTERM, 129 by SIGHUP, 141 where nobody reads what is printed.
    """
    # Threads that wait by spinning take the core that a neighbour needs: by OpenMP's default, one busy neighbour costs
    # two thirds of the speed. Those that sleep at once are a tenth to a third slower alone; a short spin costs neither.
    # OpenMP reads it when torch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # What these libraries say at import (an image processor without torchvision, …) concerns nothing that rpo does.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a caption that the terminal cannot show ends no run
    args = _parse(list(sys.argv[1:] if argv is None else argv))
    try:
        with ended_in_order():
            code = args.command.run(args) or 0
        sys.stdout.flush()  # here, where a reader that has left can be told
        return code
    except (KeyboardInterrupt, Terminated) as ended:
        advice = "; run the same command with --resume to continue from the last checkpoint" if "resume" in args else ""
        print(f"\nrpo: interrupted{advice}", file=sys.stderr)
        return ended.exit_code if isinstance(ended, Terminated) else 130
    except BrokenPipeError:  # whoever reads has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (InputError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in SURROUNDINGS:
            raise  # a defect of rpo keeps its traceback
        if args.debug:
            traceback.print_exc()
        else:
            lines = [" ".join(line.split()) for line in str(error).split("\n- ")]  # one, or one for each wrong key
            print("rpo: error: " + "\n- ".join(lines), file=sys.stderr)
        return 2


def _parse(words: list[str]) -> argparse.Namespace:
    words = _with_default(words)
    parser = argparse.ArgumentParser(prog="rpo", description="Align diffusers pipelines.")
    parser.add_argument("--version", action="version", version=f"rpo {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    groups = {"": parser.add_subparsers(metavar="COMMAND", required=True)}
    for name, command in COMMANDS.items():
        group, _, last = name.rpartition(" ")
        if group not in groups:
            inner = groups[""].add_parser(group, help=GROUPS[group], description=GROUPS[group])
            groups[group] = inner.add_subparsers(metavar="COMMAND", required=True)
        one = groups[group].add_parser(
            last,
            help=command.summary,
            description=command.summary,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=_settings(command) if _asks_for_help(words, name) else None,
        )
        command.add_arguments(one)
        one.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
        one.set_defaults(command=command)
    args, left_over = parser.parse_known_args(words)
    # argparse takes positional words from one place only; those after an option are left over.
    strangers = [word for word in left_over if word.startswith("-") or not args.command.config]
    if strangers:
        parser.error(f"unrecognized arguments: {' '.join(strangers)}")
    if left_over:
        args.overrides = [*args.overrides, *left_over]
    return args


def _with_default(words: list[str]) -> list[str]:
    """The words with the default command of their group put in, where they name none of its commands."""
    group, *rest = words or [""]
    if not rest:
        return [group, ALONE[group]] if group in ALONE else words
    if group not in DEFAULTS:
        return words
    known = {name.removeprefix(f"{group} ") for name in COMMANDS}
    return words if rest[0] in known | {"-h", "--help"} else [group, DEFAULTS[group], *rest]


def _asks_for_help(words: list[str], name: str) -> bool:
    return words[: len(name.split())] == name.split() and not {"-h", "--help"}.isdisjoint(words)


def _settings(command: Command) -> str | None:
    """The keys of a command's configuration, for the end of its help."""
    if not command.config:
        return None
    from rpo.config.settings import describe_fields

    lines = [
        f"settings, where `rpo config {command.preset}` does not say otherwise:" if command.preset else "settings:"
    ]
    for field in describe_fields(command.config_class):
        lines.append(
            f"  {field.key}={field.default}  ({field.type_name}{f', of kind {field.kind}' if field.kind else ''})"
        )
        lines += textwrap.wrap(field.doc, 100, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)
