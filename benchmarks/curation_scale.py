"""Curation of tens of millions of records, simulated: what kills cost, and what a run of any length costs to read.

    python benchmarks/curation_scale.py simulate                   # 10⁵, 10⁶ and 10⁷ records by 64 workers
    python benchmarks/curation_scale.py read                       # status and exports of 10⁵ and 10⁶ records
    python benchmarks/curation_scale.py workers                    # records a second on shapes with 1 and 2 workers

`simulate` lets 64 workers that exist in simulated time alone do the shards of a plan, through the store's own files. A
worker is killed at random, about once in eight shards: before it has written anything, with the file written and no
mark, with half a mark, or with all in place. A driver that knows nothing but the marks is killed as well, twenty times
a run. At the end every record is looked for.

`read` makes runs with two small images for each record, one in ten of which looks like the one before, and asks for
status and exports in processes of their own: the seconds of the processor, and the peak of resident memory beyond that
of the process before the step.

`workers` curates the embedded world with 1 and with 2 workers of one thread each: from when a worker has loaded its
models to the last shard, by the clock. It says how busy the machine was before, for two workers need two idle cores.
"""

import argparse
import hashlib
import heapq
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq

from rpo.curation.export import export
from rpo.curation.records import Scores
from rpo.curation.status import status_of
from rpo.curation.store.address import Store
from rpo.curation.store.keys import Keys
from rpo.curation.store.mark import STAGES, Identity, StageName, read_marks
from rpo.curation.store.run import claim
from rpo.curation.store.shard import Shard, seal
from rpo.curation.worker import tally_of
from rpo.data.preference import encode_png
from rpo.files.text import lines

WORKERS, SHARD = 64, 1000
SHARDS_PER_KILL = 8
DRIVER_KILLS = 20
MADE_BY: dict[StageName, Identity] = {stage: {"kind": "made up"} for stage in STAGES}
NUM_IMAGES = 400
ALIKE = 10
"""One in so many looks like the one before."""


def main() -> None:
    """Simulate, or measure, and print a table; or, in a child process, measure one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("simulate", "read", "workers", "step"))
    parser.add_argument("given", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument(
        "--records", type=int, nargs="+", help="sizes (default: up to 10⁷ to simulate, 10⁶ to read, 768)"
    )
    parser.add_argument("--folder", type=Path, help="where to keep the runs meanwhile (default: a temporary folder)")
    args = parser.parse_args()
    if args.what == "step":
        name, folder = args.given
        print(json.dumps(measured(STEPS[name], Path(folder))))
    elif args.what == "simulate":
        shown(simulated(records, args.folder) for records in args.records or (10**5, 10**6, 10**7))
    elif args.what == "workers":
        shown(worked(workers, records, args.folder) for records in args.records or (768,) for workers in (1, 2))
    else:
        shown(row for records in args.records or (10**5, 10**6) for row in read_of(records, args.folder))


def shown(rows: Iterable[dict[str, object]]) -> None:
    """Print rows of a table as they come."""
    for number, row in enumerate(rows):
        if number == 0:
            print(f"| {' | '.join(row)} |\n|{'---|' * len(row)}")
        cells = [f"{value:,}" if isinstance(value, int | float) else str(value) for value in row.values()]
        print(f"| {' | '.join(cells)} |", flush=True)


# What kills cost.


def simulated(records: int, folder: Path | None) -> dict[str, object]:
    """One run by workers and drivers that are killed, and what is found in it."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        start, chance = time.process_time(), random.Random(0)
        store, num_shards = Store(place), -(-records // SHARD)
        cluster = Cluster(store, num_shards, records, chance)
        most = num_shards // (DRIVER_KILLS + 1) + 1  # shards that a driver lives to see done
        drivers = 0
        while cluster.drive(most if drivers < DRIVER_KILLS else num_shards):
            drivers += 1
        seconds = time.process_time() - start
        lost, twice = looked_for(store, num_shards, records)
        return {
            "records": records,
            "shards": num_shards,
            "workers killed": cluster.killed,
            "drivers killed": drivers,
            "shards begun again": cluster.begun - num_shards,
            "lost": lost,
            "duplicates": twice,
            "CPU seconds": round(seconds, 1),
            "µs a record": round(1e6 * seconds / records, 1),
            "peak MB": round(peak_mb()),
            "bytes a record": round(sum(file.stat().st_size for file in Path(place, "shards").iterdir()) / records),
        }


class Cluster:
    """Workers in simulated time: a shard takes each about as long, and each may die of it."""

    def __init__(self, store: Store, num_shards: int, records: int, chance: random.Random) -> None:
        """Begin with nothing done."""
        self.store, self.num_shards, self.records, self.chance = store, num_shards, records, chance
        self.killed = self.begun = 0

    def drive(self, most: int) -> bool:
        """Hand out what has no mark, until so many shards are through or all; whether the driver died before."""
        made_by = claim(self.store, MADE_BY, (self.records, self.num_shards, SHARD)).made_by
        done = {mark.number for mark in read_marks(self.store)}
        waiting = deque(number for number in range(self.num_shards) if number not in done)
        working: list[tuple[float, int]] = []
        now, through = 0.0, 0
        while waiting or working:
            while waiting and len(working) < WORKERS:
                heapq.heappush(working, (now + 0.5 + self.chance.random(), waiting.popleft()))
            now, number = heapq.heappop(working)
            if self.do(number, made_by):
                through += 1
            else:
                waiting.appendleft(number)  # for the worker that takes the place of the dead one
            if through == most and waiting:
                return True
        return False

    def do(self, number: int, made_by: Mapping[StageName, str]) -> bool:
        """One worker does one shard; whether it lives to tell."""
        dies = self.chance.choice(MOMENTS) if self.chance.random() < 1 / SHARDS_PER_KILL else None
        self.begun += 1
        self.killed += dies is not None
        if dies == "before":
            return False
        shard = shard_of(number, self.records, image(0))
        try:
            seal(cast(Store, MortalStore(self.store, dies)), shard, made_by, tally_of(shard))
        except Killed:
            return False
        return dies is None


MOMENTS = ("before", "no mark", "half a mark", "after")
"""When a worker may be killed; the last is after all is in place, and before anybody was told."""


class Killed(Exception):  # noqa: N818 - it stands for a signal
    """The worker is dead."""


class MortalStore:
    """A store whose user dies while it writes its mark."""

    def __init__(self, store: Store, dies: str | None) -> None:
        """Say how."""
        self._store, self._dies = store, dies

    def write(self, name: str, data: bytes) -> None:
        """Write as much as the user lives to."""
        is_mark = name.endswith(".json")
        if is_mark and self._dies == "half a mark":
            self._store.write(name, data[: len(data) // 2])
        if is_mark and self._dies in ("no mark", "half a mark"):
            raise Killed
        self._store.write(name, data)


def looked_for(store: Store, num_shards: int, records: int) -> tuple[int, int]:
    """How many records of the plan are nowhere, and how many are somewhere twice."""
    seen, twice = Keys(), 0
    for mark in read_marks(store):
        with store.reader(mark.file) as file:
            found = pq.ParquetFile(file).read(columns=["record"]).column("record").to_pylist()
        assert found == ids_of(mark.number, records), "a shard of another plan"
        twice += sum(not seen.add(int(record, 16)) for record in found)
    return records - len(seen), twice


def ids_of(number: int, records: int) -> list[str]:
    """The records of a shard."""
    places = range(number * SHARD, min((number + 1) * SHARD, records))
    return [hexadecimal(place) for place in places]


def hexadecimal(place: int) -> str:
    """16 digits that no other place has."""
    return f"{place * 0x9E3779B97F4A7C15 % 2**64:016x}"


@cache
def image(number: int) -> bytes:
    """A small image that no other number has."""
    return encode_png(np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def shard_of(number: int, records: int, *images: bytes) -> Shard:
    """A shard that is through with everything; its sources, and edits if there are more images than one, in turn."""
    shard = Shard(number, number * SHARD, ids_of(number, records))
    digests = [hashlib.sha256(one).hexdigest() for one in images]
    shard.images = dict(zip(digests, images, strict=True))
    for place, record in enumerate(shard.ids, start=shard.start):
        source, edit = digests[place % len(digests)], digests[(place + 1 + place % 17) % len(digests)]
        sides = {"first": f"{record}/source", "second": f"{record}/edit"}
        kept = sides | {"chosen": f"{record}/edit", "label": "reward:one", "reason": None}
        dropped = sides | {"chosen": "", "label": "", "reason": "too_close"}
        rows = {
            "sources": source_of(place, record, source),
            "critiques": CRITIQUE,
            "instructions": {"instructions": ["make it red"]},
            "edits": {"image": edit, "seed": place},
            "scores": SCORES,
            "decisions": {"outcomes": [kept if place % 4 else dropped]},
        }
        for stage in STAGES:
            shard.rows[stage][record] = rows[stage]
    shard.num_through = len(STAGES)
    return shard


def source_of(place: int, record: str, digest: str) -> dict[str, object]:
    """What is known of a source; one in ten looks like the one before."""
    found = {"caption": f"the caption of {place}", "image": digest, "order": place, "group": record, "side": ""}
    look = hexadecimal(place - (place % ALIKE == 1))
    return {**found, "origin": {"kind": "folder", "file": f"{place}.png"}, "look": look}


CRITIQUE = {"critique": {"problems": [{"what": "a word " * 9, "severity": 2}], "keep": [], "overall": 3}}
SCORES = asdict(Scores({"one": 0.1}, {"one": 0.9}, 0.2, None, {"source": 0.0, "edit": 1.0}))


# What reading costs.


def read_of(records: int, folder: Path | None) -> Iterator[dict[str, object]]:
    """Each step on a run of so many records."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        make_run(Path(place) / "run", records)
        for name in STEPS:
            done = subprocess.run(
                [sys.executable, __file__, "step", name, place], check=True, capture_output=True, text=True
            )
            yield {"step": name, "records": records} | json.loads(lines(done.stdout)[-1])


def make_run(place: Path, records: int) -> None:
    """A run that is through with everything; three records in four have a pair."""
    store, num_shards = Store(place), -(-records // SHARD)
    made_by = claim(store, MADE_BY, (records, num_shards, SHARD)).made_by
    images = [image(number) for number in range(NUM_IMAGES)]
    for number in range(num_shards):
        shard = shard_of(number, records, *images)
        seal(store, shard, made_by, tally_of(shard))


def measured(step: Callable[[Path], object], folder: Path) -> dict[str, object]:
    """Seconds and peak memory of one step, and what it says."""
    before, start = peak_mb(), time.process_time()
    found = step(folder)
    seconds = time.process_time() - start
    return {"CPU seconds": round(seconds, 2), "peak MB": round(peak_mb() - before, 1), "pairs": found}


def peak_mb() -> float:
    """Most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _exported(folder: Path, **given: Any) -> int:
    return export(folder / "run", "parquet", to=folder / "export", **given).num_pairs


STEPS: dict[str, Callable[[Path], object]] = {
    "status": lambda folder: status_of(folder / "run").num_pairs,
    "export parquet": _exported,
    "export parquet, near-duplicates left out": lambda folder: _exported(folder, near_duplicates=4),
}

# What workers are worth.


def worked(workers: int, records: int, folder: Path | None) -> dict[str, object]:
    """A run of the embedded world, in a process of its own."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=folder) as place:
        run = Path(place) / "run"
        words = [
            f"source.limit={records // 2}",
            "source.images_per_prompt=2",
            f"shard={WORKED_SHARD}",
            "progress=false",
        ]
        command = [
            sys.executable,
            "-m",
            "rpo.cli",
            "curate",
            str(CONFIG),
            *words,
            f"workers={workers}",
            f"output={run}",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONFIG.parent.parent)}
        subprocess.run(command, check=True, capture_output=True, env=environment)
        began, marks = (run / "manifest.json").stat().st_mtime, [*(run / "shards").glob("*.json")]
        seconds = max(mark.stat().st_mtime for mark in marks) - began
        done = status_of(run)
    return {
        "workers": workers,
        "cores": len(os.sched_getaffinity(0)),
        "load before": round(load, 1),
        "records": done.records,
        "pairs": done.num_pairs,
        "seconds": round(seconds, 1),
        "records a second": round(done.records / seconds, 2),
    }


CONFIG = Path(__file__).parent.parent / "configs" / "curate_shapes.yaml"
WORKED_SHARD = 32


if __name__ == "__main__":
    main()
