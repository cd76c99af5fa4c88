"""What a person with a GPU runs first: is all right on it, and is it fast? At most nine minutes on one card.

    make gpu                                      # or: python benchmarks/gpu.py
    python benchmarks/gpu.py --only parity waits  # some of the parts
    python benchmarks/gpu.py --device cpu         # a rehearsal on a processor, with tiny networks

Without a GPU it is that rehearsal, which leaves out what needs one, and says so.
Every part has a process and seconds of its own: one that fails, crashes or takes too long is written down with what it
had found, and the next one runs. The findings are in one JSON file after each part, and at the end in one table. No
network is needed: pipelines have random weights, or are the embedded one. `docs/gpu.md` says how to read the table.
"""

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# A library that looks for a GPU while it is imported must not touch it: what is forked after that could not use it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch
from card import facts
from gpu_compile import blocks, graphs
from gpu_kinds import kinds, quickstart
from gpu_parity import parity
from gpu_part import Note, Part, Setting, run_part
from gpu_sizes import measure
from gpu_table import is_well, table
from gpu_waits import count_waits

from rpo.devices import device_named
from rpo.files.whole import write_whole


def card(setting: Setting, note: Note) -> None:
    """Tell what it runs on."""
    for name, one in facts(setting.where).items():
        note(name, one)


def where(device: str) -> str:
    """The device of that name; a process of its own looks for a GPU, or no other could use it after that."""
    looks = Part("", 60, lambda setting, note: note("device", str(device_named(setting.device))))
    found = run_part(looks, Setting(device), looks.seconds)
    if "device" not in found["found"]:
        sys.exit(found["reason"])
    return found["found"]["device"]


PARTS = {
    "card": Part("what it is, and how fast a matrix product is", 15, card),
    "parity": Part("a sampler's step and a DPO loss of every family, against the processor", 60, parity),
    "kinds": Part("types of numbers, attention kernels, few bits: updates of the embedded checkpoint", 55, kinds),
    "quickstart": Part("rpo quickstart, in short", 50, quickstart),
    "waits": Part("how often the host waits for the device", 35, count_waits),
    "sd15": Part("updates at the size of Stable Diffusion 1.5", 45, partial(measure, "sd15")),
    "sdxl": Part("updates at the size of SDXL", 75, partial(measure, "sdxl")),
    "sd35_medium": Part("updates at the size of Stable Diffusion 3.5 medium", 85, partial(measure, "sd35_medium")),
    "blocks": Part("what model.compile gains", 60, blocks),
    "graphs": Part("what one graph gains, and CUDA graphs", 60, graphs),
}
"""In their order; together nine minutes."""

PATIENCE = 4
"""How much longer a part may take in a rehearsal."""


def main() -> None:
    """Run the parts, write, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--seconds", type=float, help="for all parts together; each has its share")
    parser.add_argument("--device", default="auto", help="auto, cuda:1, or cpu for a rehearsal")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu.json"), help="where the findings go")
    args = parser.parse_args()

    parts = {name: part for name, part in PARTS.items() if name in args.only}
    setting = Setting(where(args.device))
    share = 1.0 if setting.on_gpu else PATIENCE
    if args.seconds is not None:
        share = args.seconds / sum(part.seconds for part in parts.values())
    report: dict[str, Any] = {"setting": {"device": setting.device, "is_rehearsal": not setting.on_gpu}, "parts": {}}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        print(f"{name}: {part.what}, at most {share * part.seconds:.0f} s", file=sys.stderr, flush=True)
        found = run_part(part, setting, share * part.seconds)
        report["parts"][name] = {"what": part.what, **found}
        write_whole(args.output, json.dumps(report, indent=2) + "\n")
        reason, _, _ = found["reason"].partition("\n")
        told = f"{name}: {found['status']} after {found['seconds']:.0f} s"
        print(": ".join(filter(None, (told, reason))), file=sys.stderr, flush=True)
    print(table(report))
    print(f"\nall findings: {args.output}")
    sys.exit(0 if is_well(report) else 1)


if __name__ == "__main__":
    if torch.cuda.is_initialized():  # or its parts could not use the device
        raise RuntimeError("a library has touched the GPU while it was imported")
    main()
