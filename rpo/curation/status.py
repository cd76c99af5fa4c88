"""What a run has come to so far: what is done by stage, what went wrong, why pairs were dropped, and how fast it is."""

import math
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rpo.curation.records import Outcome, Scores, fault_in, read_row, result_of
from rpo.curation.store.folder import STAGES, RunFolder
from rpo.curation.store.progress import rates
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

    path: Path
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


def status_of(path: str | Path) -> RunStatus:
    """Read a run's folder, be it at work or not."""
    folder = RunFolder(path)
    speed = rates(folder.path)
    stages: list[StageStatus] = []
    for name in STAGES:
        records = folder.stages[name]
        faults = Counter(fault.kind for row in records.rows() if (fault := fault_in(row)) is not None)
        stages.append(StageStatus(name, len(records), dict(faults), speed.get(name)))
    kept: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    gaps = array("d")
    for row in folder.stages["decisions"].rows():
        for outcome in read_row("decisions", row):
            if outcome.chosen:
                kept[outcome.label] += 1
                gaps.extend(evaluation_gap(folder, outcome))
            else:
                dropped[str(outcome.reason)] += 1
    return RunStatus(folder.path, tuple(stages), dict(kept), dict(dropped), _evaluation(folder, gaps))


def evaluation_gap(folder: RunFolder, outcome: Outcome) -> list[float]:
    """Score of the chosen image minus that of the rejected one by the evaluating reward; empty if it was not asked."""
    found: list[float] = []
    for name in (outcome.chosen, outcome.rejected):
        record, _, kind = name.partition("/")
        scores = result_of(folder, "scores", record)
        if not isinstance(scores, Scores) or kind not in scores.evaluation:
            return []
        found.append(scores.evaluation[kind])
    return [found[0] - found[1]]


def _evaluation(folder: RunFolder, gaps: "array[float]") -> EvaluationStatus | None:
    if not gaps:
        return None
    signs = Counter((gap > 0) - (gap < 0) for gap in gaps)
    name = folder.identity_of("scores").get("evaluation", "")
    return EvaluationStatus(name, signs[1], signs[0], signs[-1], math.fsum(gaps) / len(gaps))
