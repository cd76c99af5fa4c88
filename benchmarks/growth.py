"""How time and memory grow with a preference set: at a tenth of its size and at all of it.

    python benchmarks/growth.py                                    # 1,000,000 pairs
    python benchmarks/growth.py --pairs 100000

Pairs are lines of a `metadata.jsonl` that refer to 400 small images. Each step runs in a process of its own, with a
file of image facts of its own. Prints one JSON object: for each step and size the seconds of the CPU, and the peak of
resident memory in MB beyond that of the process before the step. Of curation, see `curation_scale.py`.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rpo.data.order import visit
from rpo.data.preference import encode_png, pairs_identity
from rpo.data.readers import read_pairs
from rpo.files.text import lines

NUM_IMAGES = 400


def main() -> None:
    """Make, measure, print; or, in a child process, measure one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--step", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        name, folder = args.step
        print(json.dumps(measured(STEPS[name], Path(folder))))
        return
    found: dict[str, dict[int, object]] = {name: {} for name in STEPS}
    for share in (10, 1):
        with tempfile.TemporaryDirectory() as folder:
            make_pairs(Path(folder), size := args.pairs // share)
            time.sleep(3)  # what was written just now does not count as settled
            for name in STEPS:
                command = [sys.executable, __file__, "--step", name, folder]
                environment = {**os.environ, "HF_DATASETS_CACHE": f"{folder}/known"}
                done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
                found[name][size] = json.loads(lines(done.stdout)[-1])
    print(json.dumps(found, indent=2))


def measured(step: Callable[[Path], object], folder: Path) -> dict[str, float]:
    """CPU seconds and peak memory of one step."""
    before, start = peak_mb(), time.process_time()
    step(folder)
    return {"cpu_seconds": round(time.process_time() - start, 2), "peak_mb": round(peak_mb() - before, 1)}


def peak_mb() -> float:
    """Most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def image(number: int) -> bytes:
    """A small image that no other number has."""
    return encode_png(np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def make_pairs(folder: Path, count: int) -> None:
    """A folder of pairs, each with a prompt of its own."""
    folder.joinpath("images").mkdir()
    for number in range(NUM_IMAGES):
        folder.joinpath(f"images/{number}.png").write_bytes(image(number))
    with folder.joinpath("metadata.jsonl").open("w", encoding="utf-8") as file:
        for number in range(count):
            names = [f"images/{(number + shift) % NUM_IMAGES}.png" for shift in (0, 1 + number % 17)]
            row = dict(zip(("chosen_file_name", "rejected_file_name"), names, strict=True))
            file.write(json.dumps({"prompt": f"the caption of pair {number}", **row}) + "\n")


def identify(folder: Path) -> None:
    """What a training run does with its set before the first update, beside encoding."""
    pairs = read_pairs(folder)
    pairs_identity(pairs)
    for position in range(len(pairs)):
        visit(len(pairs), 0, position)


STEPS: dict[str, Callable[[Path], object]] = {
    "pairs: read": read_pairs,
    "pairs: read again, identity, order": identify,
}

if __name__ == "__main__":
    main()
