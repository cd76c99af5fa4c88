"""How far each stage is, how much of it came through, and how fast: on the terminal, and kept beside the records.

Times are in a file of their own, `timings/part-<process>.jsonl`, so that the records of two runs can be compared.
"""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import final

from tqdm.auto import tqdm

from rpo.curation.folder import STAGES, StageName
from rpo.curation.records import Fault
from rpo.files import append_line, mend_last_line, read_lines

REFRESH_SECONDS = 0.3


@final
class Progress:
    """Counts what the pipeline does, and shows it."""

    def __init__(self, timings: Path, totals: Mapping[StageName, int], num_records: int, *, is_shown: bool) -> None:
        """Begin to count.

        Args:
            timings: File that the seconds of each stage are appended to.
            totals: Records of each stage that were there already, of this process's share.
        """
        self._lock = threading.Lock()
        self._timings = timings
        self._kept: Counter[StageName] = Counter()
        self._faults: Counter[StageName] = Counter()
        self._running: Counter[StageName] = Counter()
        self._since: dict[StageName, float] = {}
        self._seconds: defaultdict[StageName, float] = defaultdict(float)
        done = totals.get("decisions", 0)
        # Without a bar there is no tqdm at all: its lock is shared with forked processes, one of which may be killed.
        self._bar = tqdm(desc="curate", total=num_records, initial=done, unit="record") if is_shown else None
        self._shown_at = time.perf_counter()

    def begin(self, stage: StageName) -> None:
        """A batch of a stage has begun."""
        with self._lock:
            if self._running[stage] == 0:
                self._since[stage] = time.perf_counter()
            self._running[stage] += 1

    def end(self, stage: StageName) -> None:
        """A batch of a stage has ended."""
        with self._lock:
            self._running[stage] -= 1
            if self._running[stage] == 0:
                self._seconds[stage] += time.perf_counter() - self._since[stage]
            # The bar itself moves only with decisions.
            if self._bar is not None and time.perf_counter() - self._shown_at > REFRESH_SECONDS:
                self._bar.set_postfix_str(self._summary())
                self._shown_at = time.perf_counter()

    def recorded(self, stage: StageName, fault: Fault | None) -> None:
        """A record has its row of a stage."""
        with self._lock:
            (self._kept if fault is None else self._faults)[stage] += 1
            if self._bar is not None and stage == "decisions":
                self._bar.update()

    def close(self) -> None:
        """Keep the seconds of this session, and end the bar."""
        with self._lock:
            if self._bar is not None:
                self._bar.set_postfix_str(self._summary())
                self._bar.close()
            self._timings.parent.mkdir(parents=True, exist_ok=True)
            mend_last_line(self._timings)
            for stage, seconds in self._seconds.items():
                count = self._kept[stage] + self._faults[stage]
                append_line(self._timings, {"stage": stage, "records": count, "seconds": round(seconds, 3)})

    def _summary(self) -> str:
        parts: list[str] = []
        for stage in STAGES:
            count = self._kept[stage] + self._faults[stage]
            if count:
                seconds = self._seconds[stage]
                rate = f" {count / seconds:.3g}/s" if seconds else ""
                faults = f" ({self._faults[stage]} faults)" if self._faults[stage] else ""
                parts.append(f"{stage} {count}{faults}{rate}")
        return ", ".join(parts)


def rates(folder: Path) -> dict[str, float]:
    """Records per second of each stage, over all processes and sessions: of a second in which the stage was at work."""
    records: Counter[str] = Counter()
    seconds: defaultdict[str, float] = defaultdict(float)
    for path in sorted((folder / "timings").glob("part-*.jsonl")):
        for row in read_lines(path):
            records[str(row["stage"])] += int(str(row["records"]))
            seconds[str(row["stage"])] += float(str(row["seconds"]))
    return {stage: records[stage] / spent for stage, spent in seconds.items() if spent > 0}
