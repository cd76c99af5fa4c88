"""What a run has come to so far: what is done by stage, what went wrong, why pairs were dropped, and how fast it is.

All of it is the sum of the shards' marks; no record is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rpo.curation.store.mark import STAGES, Tally
from rpo.curation.store.run import CurationRun
from rpo.reports.html import environment


@dataclass(frozen=True)
class StageStatus:
    """One stage."""

    name: str
    done: int
    """Records that it is through with."""
    faults: Mapping[str, int]
    """Those that went wrong, by kind."""
    rate: float | None
    """Records per second while it was at work; None if that is not known."""

    @property
    def kept(self) -> int:
        """Records that it has a result for."""
        return self.done - sum(self.faults.values())


@dataclass(frozen=True)
class EvaluationStatus:
    """What the reward that evaluates, and had no say in it, thinks of the pairs that were kept."""

    name: str
    better: int
    """Pairs whose chosen image it scores higher."""
    equal: int
    worse: int
    mean_gap: float
    """Mean score of chosen images minus that of rejected ones."""


@dataclass(frozen=True)
class RunStatus:
    """The whole run."""

    path: str
    """Where it is."""
    records: int
    """Records that are planned."""
    stages: tuple[StageStatus, ...]
    kept: Mapping[str, int]
    """Pairs, by who says which image is better."""
    dropped: Mapping[str, int]
    """Pairs that were not made, by reason."""
    evaluation: EvaluationStatus | None

    @property
    def num_pairs(self) -> int:
        """Pairs that were kept."""
        return sum(self.kept.values())

    @property
    def num_dropped(self) -> int:
        """Pairs that were not made."""
        return sum(self.dropped.values())

    def __str__(self) -> str:
        """The status for the terminal."""
        return environment(is_html=False).get_template("status.txt.j2").render(status=self).rstrip()


def status_of(address: str | Path) -> RunStatus:
    """Read what a run has come to, be it at work or not."""
    run = CurationRun(address)
    found = run.tally()
    stages = tuple(_stage(found, name) for name in STAGES)
    return RunStatus(
        run.store.address, run.manifest.records, stages, found.kept, found.dropped, _evaluation(run, found)
    )


def _stage(found: Tally, name: str) -> StageStatus:
    done, seconds = found.done.get(name, 0), found.seconds.get(name, 0.0)
    return StageStatus(name, done, found.faults.get(name, {}), done / seconds if seconds > 0 else None)


def _evaluation(run: CurationRun, found: Tally) -> EvaluationStatus | None:
    if not found.evaluation:
        return None
    better, equal, worse = (int(found.evaluation[name]) for name in ("better", "equal", "worse"))
    name = run.identity_of("scores").get("evaluation", "")
    return EvaluationStatus(name, better, equal, worse, found.evaluation["gap"] / (better + equal + worse))
