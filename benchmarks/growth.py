"""How time and memory grow with a preference set: at a tenth of its size and at all of it.

    python benchmarks/growth.py                                    # 1,000,000 pairs
    python benchmarks/growth.py --pairs 851293 --times 12          # as many as Pick-a-Pic v2 has; 10⁷ in simulation

Pairs are lines of a `metadata.jsonl` that refer to 400 small images. Each step runs in a process of its own, with a
file of image facts of its own. Prints one JSON object: for each step and size the seconds of the CPU, and the peak of
resident memory in MB beyond that of the process before the step. Of curation, see `curation_scale.py`.

The steps that train update the LoRA of a Stable Diffusion of toy size; of these also the seconds up to the first
update, those of an update in the first and in the last third of all, and how much the peak of memory grew after the
first third. With `--times N` a set of N times as many is trained on as well: the same records N times, so that it is
what training makes of that many that is measured, and not the records.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from rpo.data.order import visit
from rpo.data.preference import PairSet, encode_png, pairs_identity
from rpo.data.readers import read_pairs
from rpo.files.text import lines

NUM_IMAGES = 400
UPDATES = 60


def main() -> None:
    """Make, measure, print; or, in a child process, measure one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--times", type=int, help="train on so many times the pairs as well")
    parser.add_argument("--only", default="", help="steps whose names have this in them (default: all)")
    parser.add_argument("--step", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    steps = {name: step for name, step in steps_of(args.times).items() if args.only in name}
    if args.step:
        name, folder = args.step
        print(json.dumps(measured(steps[name], Path(folder))))
        return
    found: dict[str, dict[int, object]] = {name: {} for name in steps}
    given = [] if args.times is None else ["--times", str(args.times)]
    for share in (10, 1):
        with tempfile.TemporaryDirectory() as folder:
            make_pairs(Path(folder), size := args.pairs // share)
            time.sleep(3)  # what was written just now does not count as settled
            for name in steps:
                command = [sys.executable, __file__, "--step", name, folder, *given]
                environment = {**os.environ, "HF_DATASETS_CACHE": f"{folder}/known"}
                done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
                found[name][size] = json.loads(lines(done.stdout)[-1])
                print(name, size, found[name][size], file=sys.stderr, flush=True)
    print(json.dumps(found, indent=2))


def measured(step: Callable[[Path], Mapping[str, float] | None], folder: Path) -> dict[str, float]:
    """CPU seconds and peak memory of one step, and what it says itself."""
    before, start = peak_mb(), time.process_time()
    told = step(folder) or {}
    return {"cpu_seconds": round(time.process_time() - start, 2), "peak_mb": round(peak_mb() - before, 1), **told}


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


def read(folder: Path) -> None:
    """Read the set."""
    read_pairs(folder)


def identify(folder: Path) -> None:
    """What a training run does with its set before the first update, beside encoding."""
    pairs = read_pairs(folder)
    pairs_identity(pairs)
    for position in range(len(pairs)):
        visit(len(pairs), 0, position)


def train(folder: Path, times: int = 1) -> dict[str, float]:
    """A run of some updates, from reading the set on."""
    import torch  # not at the top: the other steps do without
    from dpo_step import build

    from rpo.trainers.dpo import DPO
    from rpo.trainers.dpo_config import DPOConfig
    from rpo.trainers.settings import AdapterConfig, LearningConfig
    from rpo.trainers.trainer import Trainer

    preset = {"channels": (32, 64, 128), "layers": 1, "text": (64, 1), "vae": (32, 32, 32, 32), "resolution": 64}
    model = build(preset, torch.float32, "cpu")
    began = time.process_time()
    pairs = read_pairs(folder)
    pairs = PairSet(pairs.pairs * times, pairs.origin)
    seen: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory(dir=folder) as output:
        config = DPOConfig(
            output=output,
            pairs_per_update=2,
            preview_every=0,
            preflight=False,
            max_chosen_error_ratio=math.inf,
            max_rejected_error_ratio=math.inf,
            adapter=AdapterConfig(rank=4),
            learning=LearningConfig(updates=UPDATES, micro_batch=2, checkpoint_every=UPDATES, progress=False),
        )
        trainer = Trainer(model.pipe, DPO(pairs, config))
        trainer.train(on_update=lambda update, metrics: seen.append((time.process_time(), peak_mb())))
    third = UPDATES // 3
    at = {name: seen[place - 1] for name, place in (("one", 1), ("third", third), ("late", UPDATES - third))}
    return {
        "to_the_first_update": round(at["one"][0] - began, 2),
        "an_update_early": round((at["third"][0] - at["one"][0]) / (third - 1), 3),
        "an_update_late": round((seen[-2][0] - at["late"][0]) / (third - 1), 3),
        "growth_mb": round(seen[-1][1] - at["third"][1], 1),
    }


def steps_of(times: int | None = None) -> dict[str, Callable[[Path], Mapping[str, float] | None]]:
    """What is measured, by name."""
    steps: dict[str, Callable[[Path], Mapping[str, float] | None]] = {
        "pairs: read": read,
        "pairs: read again, identity, order": identify,
        f"DPO: {UPDATES} updates": train,
    }
    if times is not None:
        steps[f"DPO: {UPDATES} updates on {times} times as many"] = partial(train, times=times)
    return steps


if __name__ == "__main__":
    main()
