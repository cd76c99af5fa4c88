"""The whole history of a record, joined from the lines of all stages."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from rpo.curation.decide import Outcome
from rpo.curation.folder import STAGES, RunFolder, StageName
from rpo.curation.parts import Row
from rpo.curation.records import Critique, Fault, Instructions
from rpo.curation.score import Scores


@dataclass(frozen=True)
class Source:
    """The image that a record begins with."""

    id: str
    caption: str
    image: str
    """Its sha256."""
    order: int
    """Place in the plan."""
    origin: Mapping[str, str | int]
    """Where it comes from."""
    group: str
    """Id of the record that it is done together with, or its own."""
    side: str
    """"chosen" or "rejected" if it was a side of a pair, else empty."""


@dataclass(frozen=True)
class Edit:
    """An edited image."""

    image: str
    """Its sha256."""
    seed: int


@dataclass(frozen=True)
class History:
    """Everything that is known of a record; None where a stage was not reached."""

    source: Source
    critique: Critique | Fault | None = None
    instructions: Instructions | Fault | None = None
    edit: Edit | Fault | None = None
    scores: Scores | Fault | None = None
    outcomes: tuple[Outcome, ...] | None = None
    """What was decided."""

    def image_of(self, kind: str) -> str | None:
        """The sha256 of "source" or "edit", if there is such an image."""
        if kind == "source":
            return self.source.image
        return self.edit.image if isinstance(self.edit, Edit) else None


def history_of(folder: RunFolder, record: str) -> History:
    """What the stages have found out about one record."""
    return _history(folder, folder.stages["sources"][record])


def _history(folder: RunFolder, source: Row) -> History:
    rows = {stage: folder.stages[stage].get(str(source["id"])) for stage in STAGES[1:]}
    return History(
        source_of(source),
        _read(rows["critiques"], lambda row: Critique.model_validate(row["critique"])),
        _read(rows["instructions"], lambda row: Instructions.model_validate({"instructions": row["instructions"]})),
        _read(rows["edits"], lambda row: Edit(row["image"], row["seed"])),
        _read(rows["scores"], scores_of),
        None if rows["decisions"] is None else outcomes_in(rows["decisions"]),
    )


def histories(folder: RunFolder) -> Iterator[History]:
    """All records, in the order of the plan."""
    return (_history(folder, source) for source in folder.stages["sources"].in_order("order"))


def fault_in(row: Row | None) -> Fault | None:
    """The fault that a row records, if it does."""
    found = cast(Any, row or {}).get("fault")
    return Fault(found["kind"], found["message"], found["raw"]) if found else None


def source_of(row: Row) -> Source:
    """The source that a row records."""
    one = cast(Any, row)
    return Source(one["id"], one["caption"], one["image"], one["order"], one["origin"], one["group"], one["side"])


def scores_of(row: Row) -> Scores:
    """The scores that a row records."""
    one = cast(Any, row)
    return Scores(one["source"], one["edit"], one["distance"], one["similarity"], one["evaluation"])


def _read(row: Row | None, read: Any) -> Any:
    if row is None:
        return None
    return fault_in(row) or read(row)


def outcomes_in(row: Row) -> tuple[Outcome, ...]:
    """The outcomes that a row records."""
    return tuple(Outcome(**one) for one in cast(Any, row)["outcomes"])


def stage_is_ok(folder: RunFolder, stage: StageName, record: str) -> bool:
    """Whether a stage has a result for a record, and no fault."""
    row = folder.stages[stage].get(record)
    return row is not None and "fault" not in row
