"""How far each stage is, how much of it came through, and how fast: on the terminal, and kept beside the records.

Times are in a file of their own, `timings/part-<process>.jsonl`, so that the records of two runs can be compared.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import final

from tqdm.auto import tqdm

from rpo.curation.store.folder import STAGES, StageName
from rpo.files.whole import append_line, mend_last_line, read_lines

REFRESH_SECONDS = 0.3


@final
class Progress:
    """Counts what the pipeline does, and shows it; may be used by several threads."""

    def __init__(self, timings: Path, done: int, num_records: int, *, is_shown: bool) -> None:
        """Begin to count.

        Args:
            timings: File that the seconds of each stage are appended to.
            done: Records that were decided already, of this process's share.
        """
        self._lock = threading.Lock()
        self._timings = timings
        self._records, self._faults = Counter[StageName](), Counter[StageName]()
        self._running, self._seconds = Counter[StageName](), Counter[StageName]()
        # Without a bar there is no tqdm at all: its lock is shared with forked processes, one of which may be killed.
        self._bar = tqdm(desc="curate", total=num_records, initial=done, unit="record") if is_shown else None
        self._shown_at = time.perf_counter()
        self._since: dict[StageName, float] = {}

    @contextmanager
    def batch(self, stage: StageName) -> Iterator[None]:
        """A batch of a stage is at work meanwhile; of batches at the same time, the seconds count once."""
        with self._lock:
            if self._running[stage] == 0:
                self._since[stage] = time.perf_counter()
            self._running[stage] += 1
        try:
            yield
        finally:
            with self._lock:
                self._running[stage] -= 1
                now = time.perf_counter()
                if self._running[stage] == 0:
                    self._seconds[stage] += now - self._since[stage]  # pyright: ignore[reportArgumentType]
                if self._bar is not None and now - self._shown_at > REFRESH_SECONDS:
                    self._bar.set_postfix_str(self._summary())
                    self._shown_at = now

    def recorded(self, stage: StageName, *, is_fault: bool) -> None:
        """A record has its row of a stage."""
        with self._lock:
            self._records[stage] += 1
            self._faults[stage] += is_fault
            if self._bar is not None and stage == "decisions":
                self._bar.update()

    def close(self) -> None:
        """Keep the seconds of this session, and end the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(self._summary())
            self._bar.close()
        self._timings.parent.mkdir(parents=True, exist_ok=True)
        mend_last_line(self._timings)
        for stage, seconds in self._seconds.items():
            row = {"stage": stage, "records": self._records[stage], "seconds": round(seconds, 3)}
            append_line(self._timings, row)

    def _summary(self) -> str:
        parts: list[str] = []
        for stage in STAGES:
            if count := self._records[stage]:
                rate = f" {count / self._seconds[stage]:.3g}/s" if self._seconds[stage] else ""
                faults = f" ({self._faults[stage]} faults)" if self._faults[stage] else ""
                parts.append(f"{stage} {count}{faults}{rate}")
        return ", ".join(parts)


def rates(folder: Path) -> dict[str, float]:
    """Records per second of each stage, over all processes and sessions: of a second in which the stage was at work."""
    records, seconds = Counter[str](), Counter[str]()
    for path in sorted((folder / "timings").glob("part-*.jsonl")):
        for row in read_lines(path):
            records[str(row["stage"])] += int(str(row["records"]))
            seconds[str(row["stage"])] += float(str(row["seconds"]))  # pyright: ignore[reportArgumentType]
    return {stage: records[stage] / spent for stage, spent in seconds.items() if spent > 0}
