"""What training on images of many shapes costs, against squares of the same area: time, memory, and a resumed run.

    python benchmarks/buckets.py                        # 10,000 pairs of 40 sizes, a small Stable Diffusion on the CPU
    python benchmarks/buckets.py --pairs 500 --updates 6

Two sets of equal length are written as tar shards: one of many sizes, trained in buckets, and one of squares. The
images of a run are encoded before its first update. Time is that of the processor, per update after the first two, in
turns of both sets; throughput is in latents of the square's area, since buckets are a little smaller. Memory is the
resident set: the most of the last half of the updates beyond the most of the first. Prints one JSON object.
"""

import argparse
import io
import json
import math
import os
import tarfile
import tempfile
import time
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from dpo_step import build
from PIL import Image

from rpo.data.preference import PairSet
from rpo.data.readers import read_pairs
from rpo.trainers.dpo import DPO
from rpo.trainers.dpo_config import DPOConfig
from rpo.trainers.settings import AdapterConfig, LearningConfig
from rpo.trainers.trainer import Trainer

PRESET = {"channels": (32, 64, 128), "layers": 1, "text": (64, 1), "vae": (32, 32, 32, 32), "resolution": 128}
STEP, MICRO_BATCH, PAIRS_PER_UPDATE = 16, 4, 16
SHARD_PAIRS = 2500
WARM_UP = 2  # updates that are not timed
MIB = 2**20


def main() -> None:
    """Write the sets, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--sizes", type=int, default=40)
    parser.add_argument("--updates", type=int, default=48)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measured(Path(folder), args.pairs, args.sizes, args.updates), indent=1))


def measured(folder: Path, count: int, num_sizes: int, updates: int) -> dict[str, object]:
    """All figures."""
    side = PRESET["resolution"]
    sets = {
        name: read_pairs(written(folder / name, count, sizes))
        for name, sizes in (("square", [(side, side)]), ("many", shapes(num_sizes, side)))
    }
    runs = {f"{name} {turn}": Run(folder, name, sets[name], turn, updates) for turn in (0, 1) for name in sets}
    for run in runs.values():
        run.train(updates)
    parts = Run(folder, "many", sets["many"], 2, updates)
    parts.train(updates // 2)
    parts.train(updates, resume=True)
    sizes = runs["many 0"].sizes
    area = mean(math.prod(sizes.buckets.canvases[bucket]) for bucket in sizes.buckets.of_pair) / side**2
    seconds = {name: mean(runs[f"{name} {turn}"].seconds for turn in (0, 1)) for name in sets}
    return {
        "pairs": count,
        "sizes": len({pair.facts("chosen").size for pair in sets["many"]}),
        "buckets": len(sizes.buckets.canvases),
        "pairs in the smallest bucket": min(sizes.buckets.counts),
        "area of a bucket, of the square's": round(area, 3),
        "updates": updates,
        "processor seconds per update": {name: round(one, 3) for name, one in seconds.items()},
        "throughput, of the square's at equal area": round(area * seconds["square"] / seconds["many"], 3),
        "growth of memory in MiB": {name: round(run.growth, 1) for name, run in runs.items()},
        "memory in MiB": {name: round(max(run.memory)) for name, run in runs.items()},
        "a resumed run is the undisturbed one": torch.equal(parts.weights, runs["many 0"].weights),
    }


class Run:
    """One training, and what it took."""

    def __init__(self, folder: Path, name: str, pairs: PairSet, turn: int, updates: int):
        """Say where; nothing is loaded yet."""
        self.folder, self.name, self.pairs, self.turn, self.updates = folder, name, pairs, turn, updates
        self.times: list[float] = []
        self.memory: list[float] = []

    def train(self, updates: int, *, resume: bool = False) -> None:
        """Train up to an update, on a pipeline of its own."""
        torch.manual_seed(0)
        model = build(PRESET, torch.float32, "cpu")
        config = DPOConfig(
            output=str(self.folder / f"run {self.name} {self.turn}"),
            cache_folder=str(self.folder / f"cache {self.name}"),
            bucket_step=None if self.name == "square" else STEP,
            pairs_per_update=PAIRS_PER_UPDATE,
            max_chosen_error_ratio=math.inf,
            max_rejected_error_ratio=math.inf,
            preview_every=0,
            preflight=False,
            adapter=AdapterConfig(rank=8),
            learning=LearningConfig(
                updates=updates, micro_batch=MICRO_BATCH, checkpoint_every=self.updates // 2, progress=False
            ),
        )
        algorithm = DPO(self.pairs, config)
        trainer = Trainer(model.pipe, algorithm)
        after = algorithm.after

        def watched(update: int, metrics: dict[str, float]) -> None:
            after(update, metrics)
            self.times.append(time.process_time())
            self.memory.append(resident())

        algorithm.after = watched
        trainer.train(resume=resume)
        self.sizes = algorithm.sizes
        self.weights = torch.cat([one.detach().flatten() for one in trainer.run.policy.parameters])

    @property
    def seconds(self) -> float:
        """Of the processor, per update."""
        return (self.times[-1] - self.times[WARM_UP - 1]) / (len(self.times) - WARM_UP)

    @property
    def growth(self) -> float:
        """Of the resident set, in MiB."""
        half = len(self.memory) // 2
        return max(self.memory[half:]) - max(self.memory[:half])


def resident() -> float:
    """MiB of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text("utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def shapes(count: int, side: int) -> list[tuple[int, int]]:
    """So many (width, height) from 1:2 to 2:1, every other one a quarter longer than the square's area asks for."""
    ratios = [2 ** (2 * index / max(1, count - 1) - 1) for index in range(count)]
    scales = [side * (1.25 if index % 2 else 1.0) for index in range(count)]
    return [
        (math.ceil(scale * ratio**0.5), math.ceil(scale / ratio**0.5))
        for ratio, scale in zip(ratios, scales, strict=True)
    ]


def written(folder: Path, count: int, sizes: list[tuple[int, int]]) -> Path:
    """A folder of tar shards: gradients, on the chosen side brighter to the right."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for first in range(0, count, SHARD_PAIRS):
        with tarfile.open(folder / f"{first:06}.tar", "w") as archive:
            for number in range(first, min(first + SHARD_PAIRS, count)):
                width, height = sizes[number % len(sizes)]
                colours = draw.integers(0, 256, (2, 3))
                ramp = np.linspace(0, 1, width)[None, :, None]
                for name, slope in (("chosen", ramp), ("rejected", 1 - ramp)):
                    row = (colours[0] * slope + colours[1] * (1 - slope)).astype(np.uint8)
                    stream = io.BytesIO()
                    Image.fromarray(np.repeat(row, height, axis=0)).save(stream, format="PNG", compress_level=1)
                    add(archive, f"{number:06}.{name}.png", stream.getvalue())
                add(archive, f"{number:06}.txt", f"prompt {number % 100}".encode())
    return folder


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Put a file into an archive."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


if __name__ == "__main__":
    main()
