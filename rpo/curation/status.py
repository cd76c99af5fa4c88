"""What a run has come to so far: what is done by stage, what went wrong, why pairs were dropped, and how fast it is."""

import math
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rpo.curation.decide import Outcome
from rpo.curation.folder import STAGES, RunFolder
from rpo.curation.history import fault_in, outcomes_in, scores_of
from rpo.curation.progress import rates


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

    def __str__(self) -> str:
        """The status for the terminal."""
        lines = [str(self.path)]
        for stage in self.stages:
            rate = f"{stage.rate:8.3g} a second" if stage.rate is not None else ""
            faults = ", ".join(f"{count} {kind}" for kind, count in sorted(stage.faults.items()))
            row = f"  {stage.name:<13}{stage.done:>8} done {stage.kept:>8} kept {rate:<19} {faults}"
            lines.append(row.rstrip())
        lines.append(
            f"  {'pairs':<13}{self.num_pairs:>8} kept{_share(self.num_pairs, self.num_pairs + self.num_dropped)}"
        )
        lines += [f"    {count:>8}  labelled by {label}" for label, count in sorted(self.kept.items())]
        lines.append(f"  {'':<13}{self.num_dropped:>8} dropped")
        lines += [
            f"    {count:>8}  {reason}" for reason, count in Counter(dict(sorted(self.dropped.items()))).most_common()
        ]
        if self.evaluation is not None:
            one = self.evaluation
            lines.append(
                f"  {one.name} finds the chosen image better in {one.better} pairs, equal in {one.equal}, worse in "
                f"{one.worse}; mean gap {one.mean_gap:+.3g}"
            )
        return "\n".join(lines)

    @property
    def num_dropped(self) -> int:
        """Pairs that were not made."""
        return sum(self.dropped.values())


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
        for outcome in outcomes_in(row):
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
        row = folder.stages["scores"].get(record)
        scores = {} if row is None or fault_in(row) is not None else scores_of(row).evaluation
        if kind not in scores:
            return []
        found.append(scores[kind])
    return [found[0] - found[1]]


def _evaluation(folder: RunFolder, gaps: "array[float]") -> EvaluationStatus | None:
    if not gaps:
        return None
    signs = Counter((gap > 0) - (gap < 0) for gap in gaps)
    name = folder.identity_of("scores").get("evaluation", "")
    return EvaluationStatus(name, signs[1], signs[0], signs[-1], math.fsum(gaps) / len(gaps))


def _share(part: int, whole: int) -> str:
    return f" ({100 * part / whole:.1f} %)" if whole else ""
