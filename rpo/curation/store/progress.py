"""How far each stage is, how much of it came through, and how fast, on the terminal."""

import threading
import time
from collections import Counter
from typing import final

from tqdm.auto import tqdm

from rpo.curation.store.mark import STAGES, StageName, Tally

REFRESH_SECONDS = 0.3


@final
class Progress:
    """Counts what is done, and shows it; may be used by several threads."""

    def __init__(self, done: int, num_records: int, *, is_shown: bool) -> None:
        """Begin to count.

        Args:
            done: Records that were through already, of this process's share.
        """
        self._lock = threading.Lock()
        self._records, self._faults, self._seconds = Counter[str](), Counter[str](), Counter[str]()
        # Without a bar there is no tqdm at all: its lock is shared with forked processes, one of which may be killed.
        self._bar = tqdm(desc="curate", total=num_records, initial=done, unit="record") if is_shown else None
        self._shown_at = time.perf_counter()

    def took(self, stage: StageName, seconds: float) -> None:
        """A stage was at work on a shard for so long."""
        with self._lock:
            self._seconds[stage] += seconds  # pyright: ignore[reportArgumentType]

    def recorded(self, stage: StageName, *, is_fault: bool) -> None:
        """A record has its row of a stage."""
        with self._lock:
            self._records[stage] += 1
            self._faults[stage] += is_fault
            self._show(stage == "decisions")

    def sealed(self, before: Tally, now: Tally) -> None:
        """Another process has sealed a shard, of which something may have been known before."""
        with self._lock:
            for stage in STAGES:
                self._records[stage] += now.done.get(stage, 0) - before.done.get(stage, 0)
                self._faults[stage] += sum(now.faults.get(stage, {}).values())
                self._faults[stage] -= sum(before.faults.get(stage, {}).values())
                self._seconds[stage] += now.seconds.get(stage, 0.0) - before.seconds.get(stage, 0.0)  # pyright: ignore[reportArgumentType]
            self._show(now.done.get("decisions", 0) - before.done.get("decisions", 0))

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(self._summary())
            self._bar.close()

    def _show(self, count: int) -> None:
        if self._bar is None:
            return
        self._bar.update(count)
        if time.perf_counter() - self._shown_at > REFRESH_SECONDS:
            self._bar.set_postfix_str(self._summary())
            self._shown_at = time.perf_counter()

    def _summary(self) -> str:
        parts: list[str] = []
        for stage in STAGES:
            if count := self._records[stage]:
                rate = f" {count / self._seconds[stage]:.3g}/s" if self._seconds[stage] else ""
                faults = f" ({self._faults[stage]} faults)" if self._faults[stage] else ""
                parts.append(f"{stage} {count}{faults}{rate}")
        return ", ".join(parts)
