"""`rpo serve-rewards`: rewards for runs on other machines, or in other environments."""

import argparse
import sys
from pathlib import Path
from urllib.parse import quote

from rpo.cli.command import Command
from rpo.errors import InputError

MEBIBYTE = 2**20


def serve(args: argparse.Namespace) -> None:
    """Answer until somebody ends it."""
    from rpo.devices import device_named
    from rpo.rewards import ADDRESSES, load_reward
    from rpo.rewards.remote import form
    from rpo.rewards.remote.served import Served
    from rpo.rewards.remote.server import Limits, RewardServer

    token = form.token() if args.token else ""
    if args.token and not token:
        raise InputError(
            f"--token asks clients for a token, but {form.TOKEN_VARIABLE} is not set; set it here and there"
        )
    if args.files is not None and not args.files.is_dir():
        raise InputError(f"--files is {args.files}, which is no folder; give one that clients can write to")
    if remote := [name for name in args.names if name.startswith(ADDRESSES)]:
        raise InputError(f"{remote[0]} is served already; give its address to the run itself")
    device = device_named(args.device)
    rewards = {name: Served(name, load_reward(name), device=device, batch_size=args.batch_size) for name in args.names}
    limits = Limits(args.max_request * MEBIBYTE, args.concurrency, args.files)
    server = RewardServer(
        rewards,
        host=args.host,
        port=args.port,
        token=token,
        limits=limits,
        tell=lambda told: print(f"rpo: {told}", file=sys.stderr, flush=True),
    )
    places = [f"  {server.address}/{quote(name, safe='/:@')}" for name in rewards]
    print("serving, on", device, *places, "Ctrl-C ends it", sep="\n", flush=True)
    server.serve()


def takes_serve(parser: argparse.ArgumentParser) -> None:
    """Declare what `rpo serve-rewards` accepts."""
    add = parser.add_argument
    add("names", metavar="NAME", nargs="+", help="reward to serve, by name or as package.module:attribute")
    add("--host", metavar="ADDRESS", default="127.0.0.1", help="to listen at (default 127.0.0.1, this machine alone)")
    add("--port", metavar="N", type=int, default=8765, help="to listen at, 0 for any (default 8765)")
    add("--token", action="store_true", help="ask clients for the token in RPO_REWARD_TOKEN")
    add("--device", metavar="NAME", default="auto", help="auto, cpu, cuda:1 … (default auto)")
    add("--batch-size", metavar="N", type=_count, default=64, help="images per question to a reward (default 64)")
    add("--concurrency", metavar="N", type=_count, default=8, help="requests held at once (default 8)")
    add("--max-request", metavar="MIB", type=_count, default=256, help="size of a request (default 256)")
    add("--files", metavar="DIR", type=Path, help="folder whose images clients may name instead of sending them")


def _count(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 on")
    return int(text)


SERVE = {
    "serve-rewards": Command("serve rewards over HTTP, to runs that name http://HOST:PORT/NAME", takes_serve, serve)
}
"""The command, by name."""
