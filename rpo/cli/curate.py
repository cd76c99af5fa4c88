"""The commands of `rpo curate`: run, status, page, export, audit."""

import argparse
import os
from pathlib import Path

from rpo.cli.command import Command, config_and_overrides, takes_config, takes_overrides
from rpo.errors import InputError


def run(args: argparse.Namespace) -> None:
    """Curate what a YAML file, or nothing but overrides, describes."""
    from rpo.config.load import load_config
    from rpo.curation.curate import CurateConfig, curate
    from rpo.curation.page import write_page
    from rpo.curation.records import Unavailable
    from rpo.curation.status import status_of
    from rpo.curation.store.run import share_of

    path, overrides = config_and_overrides(args)
    config = load_config(CurateConfig, path, overrides)
    try:
        folder = curate(config, resume=args.resume)
    except Unavailable as error:
        raise InputError(f"{error}; run the same command with --resume: what was found out is kept") from error
    if share_of(config.shards, os.environ).index == 0:
        print(status_of(folder))
        print(f"to leaf through: {write_page(folder)}")


def status(args: argparse.Namespace) -> None:
    """Say what a run has come to."""
    from rpo.curation.status import status_of

    print(status_of(args.run_folder))


def page(args: argparse.Namespace) -> None:
    """Write the page of a run, to leaf through."""
    from rpo.curation.page import write_page

    print(write_page(args.run_folder, args.to, max_records=args.max_records))


def export(args: argparse.Namespace) -> None:
    """Write the pairs of a run for training or for others, and say what an upload would send."""
    from rpo.curation.export import export as write
    from rpo.curation.export import push_to_hub

    shares = args.shares or [1.0] * len(args.run_folders)
    if len(shares) != len(args.run_folders):
        raise InputError(
            f"there are {len(args.run_folders)} runs and {len(shares)} shares; expected one for each; give as many"
        )
    runs = dict(zip(args.run_folders, shares, strict=True))
    done = write(runs, args.form, to=args.to, licence=args.licence, near_duplicates=args.near_duplicates)
    print(done)
    if args.repo:
        print(push_to_hub(done.path, args.repo, push=args.push, private=not args.public))


def audit(args: argparse.Namespace) -> None:
    """Say how far critic and judges of a run can be trusted."""
    from rpo.config.load import load_config
    from rpo.curation.audit import AuditConfig, format_audit
    from rpo.curation.audit import audit as examine
    from rpo.curation.records import Unavailable

    try:
        print(format_audit(examine(args.run_folder, load_config(AuditConfig, None, args.overrides))))
    except Unavailable as error:
        raise InputError(f"{error}; run the same command again: what was answered is kept") from error


def takes_run_folder(parser: argparse.ArgumentParser) -> None:
    """Declare what `rpo curate status` accepts."""
    parser.add_argument("run_folder", metavar="RUN", help="where a run of curation is: its output")


def takes_page(parser: argparse.ArgumentParser) -> None:
    """Declare what `rpo curate page` accepts."""
    takes_run_folder(parser)
    parser.add_argument("--to", metavar="FILE", type=Path, help="file to write (default: pairs.html in the run)")
    parser.add_argument(
        "--max-records", metavar="N", type=int, default=400, help="records shown with their images (default 400)"
    )


def takes_audit(parser: argparse.ArgumentParser) -> None:
    """Declare what `rpo curate audit` accepts."""
    takes_run_folder(parser)
    takes_overrides(parser)


def takes_export(parser: argparse.ArgumentParser) -> None:
    """Declare what `rpo curate export` accepts."""
    parser.add_argument("run_folders", metavar="RUN", nargs="+", help="where a run is; several are mixed")
    parser.add_argument(
        "--shares", metavar="NUMBER", nargs="+", type=float, help="of each run, in their order (default: equal)"
    )
    parser.add_argument(
        "--near-duplicates",
        metavar="BITS",
        type=int,
        help="leave out pairs whose source image looks like an earlier one: its hash of 64 bits differs in at most "
        "so many; 0 to 4 find the same picture (default: keep all)",
    )
    parser.add_argument(
        "--form",
        choices=("native", "parquet", "pickapic", "edits"),
        default="native",
        help="what is written; edits is for an editing model (default native)",
    )
    parser.add_argument("--to", metavar="DIR", type=Path, help="folder to write (default: export/FORM in the run)")
    parser.add_argument("--licence", metavar="ID", help="licence of the data set, for its card")
    parser.add_argument("--repo", metavar="OWNER/NAME", help="say what an upload to the Hub would send")
    parser.add_argument("--push", action="store_true", help="with --repo: really upload")
    parser.add_argument("--public", action="store_true", help="with --push: let everybody see it")


CURATE = {
    "curate run": Command(
        "make preference pairs: criticise images, instruct, edit, score, decide",
        takes_config,
        run,
        "rpo.curation.curate_config:CurateConfig",
    ),
    "curate status": Command("say what a run of curation has come to", takes_run_folder, status),
    "curate page": Command("write pairs.html, to leaf through a run in a browser", takes_page, page),
    "curate export": Command("write the pairs of a run for training or for others", takes_export, export),
    "curate audit": Command(
        "measure how far critic and judges of a run can be trusted",
        takes_audit,
        audit,
        "rpo.curation.curate_config:AuditConfig",
    ),
}
"""The commands of the group, by name."""
