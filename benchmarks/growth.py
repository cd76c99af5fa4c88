"""How time and memory grow with a preference set and with a run of curation: each at a tenth of its size and at all.

    python benchmarks/growth.py                                    # 1,000,000 pairs and 50,000 records
    python benchmarks/growth.py --pairs 100000 --records 5000

Pairs are lines of a `metadata.jsonl` that refer to 400 small images; records are lines of all stages of a run. Each
step runs in a process of its own, with a file of image facts of its own. Prints one JSON object: for each step and size
the seconds of the CPU, and the peak of resident memory in MB beyond that of the process before the step.
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
from dataclasses import asdict
from pathlib import Path

import numpy as np

from rpo.curation.export import export
from rpo.curation.page import write_page
from rpo.curation.records import Outcome
from rpo.curation.status import status_of
from rpo.curation.store.shard import STAGES
from rpo.data.order import visit
from rpo.data.preference import encode_png, pairs_identity
from rpo.data.readers import read_pairs
from rpo.files.text import lines, write_text

NUM_IMAGES = 400


def main() -> None:
    """Make, measure, print; or, in a child process, measure one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--records", type=int, default=50_000)
    parser.add_argument("--step", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        name, folder = args.step
        print(json.dumps(measured(STEPS[name], Path(folder))))
        return
    found: dict[str, dict[int, object]] = {name: {} for name in STEPS}
    for share in (10, 1):
        with tempfile.TemporaryDirectory() as folder:
            sizes = {"pairs": args.pairs // share, "records": args.records // share}
            make_pairs(Path(folder), sizes["pairs"])
            make_run(Path(folder), sizes["records"])
            time.sleep(3)  # what was written just now does not count as settled
            for name in STEPS:
                command = [sys.executable, __file__, "--step", name, folder]
                environment = {**os.environ, "HF_DATASETS_CACHE": f"{folder}/known"}
                done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
                size = sizes["records" if name.startswith("curate") else "pairs"]
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


def make_run(folder: Path, count: int) -> None:
    """A folder of a run that is through with everything."""
    run = folder / "run"
    for stage in (*STAGES, "images"):
        run.joinpath(stage).mkdir(parents=True)
    for number in range(NUM_IMAGES):
        run.joinpath(f"images/{number:064x}.png").write_bytes(image(number))
    identities = {stage: {"identity": {"kind": "made up"}, "sha256": ""} for stage in STAGES}
    write_text(run / "manifest.json", json.dumps({"layout": 1, "stages": identities}))
    files = {stage: run.joinpath(f"{stage}/part-0.jsonl").open("w", encoding="utf-8") for stage in STAGES}
    for number in range(count):
        for stage, row in rows_of(number, f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}").items():
            files[stage].write(json.dumps(row) + "\n")
    for file in files.values():
        file.close()


def rows_of(number: int, record: str) -> dict[str, dict[str, object]]:
    """What each stage says of a record."""
    first, second = (f"{(number + shift) % NUM_IMAGES:064x}" for shift in (0, 1 + number % 17))
    origin = {"kind": "folder", "file": f"{number}.png"}
    source = {"caption": f"caption {number}", "image": first, "order": number, "origin": origin, "group": record}
    scores = {"source": {"one": 0.1}, "edit": {"one": 0.9}, "distance": 0.2, "similarity": None, "evaluation": {}}
    kept = Outcome(f"{record}/source", f"{record}/edit", f"{record}/edit", "reward:one")
    dropped = Outcome(f"{record}/source", f"{record}/edit", reason="too_close")
    rows = {
        "sources": {**source, "side": ""},
        "critiques": {"critique": {"problems": [{"what": "a word " * 9, "severity": 2}], "keep": [], "overall": 3}},
        "instructions": {"instructions": ["make it red"]},
        "edits": {"image": second, "seed": number},
        "scores": scores,
        "decisions": {"outcomes": [asdict(kept if number % 4 else dropped)]},
    }
    return {stage: {"id": record, **row} for stage, row in rows.items()}


def identify(folder: Path) -> None:
    """What a training run does with its set before the first update, beside encoding."""
    pairs = read_pairs(folder)
    pairs_identity(pairs)
    for position in range(len(pairs)):
        visit(len(pairs), 0, position)


STEPS: dict[str, Callable[[Path], object]] = {
    "pairs: read": read_pairs,
    "pairs: read again, identity, order": identify,
    "curate status": lambda folder: status_of(folder / "run"),
    "curate page": lambda folder: write_page(folder / "run"),
    "curate export": lambda folder: export(folder / "run"),
    "curate export parquet": lambda folder: export(folder / "run", "parquet"),
}

if __name__ == "__main__":
    main()
