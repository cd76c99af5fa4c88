"""Curated pairs for training and for others: every pair with how it came to be.

Four forms: "native" is a folder of images with `metadata.jsonl`, "parquet" the same as a table, "pickapic" a table
with the columns of Pick-a-Pic; "edits" is such a folder for an editing model: source, instruction, better and worse
edit. Each appears whole or not at all, in the order of the plan, with a card beside it.

An upload to the Hugging Face Hub is a plan first, which lists every file that would be sent; nothing else is sent.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

from huggingface_hub import DatasetCard, HfApi

from rpo.curation.card import shown_model, write_dataset_card
from rpo.curation.decide import Candidate, edits_of, source_of
from rpo.curation.records import Critique, History, Instructions, Outcome, Scores, histories, history_of
from rpo.curation.status import RunStatus, status_of
from rpo.curation.store.folder import RunFolder, StageName
from rpo.data.preference import PreferencePair
from rpo.data.writers import write_pairs, write_parquet, write_pickapic
from rpo.errors import InputError
from rpo.files.local_paths import refuse_private
from rpo.files.text import write_text
from rpo.files.whole import replace_folder
from rpo.publishing.publish import CARD, PlannedFile, PublishPlan, carry_out, check_repo_id

ExportForm = Literal["native", "parquet", "pickapic", "edits"]

PAIRS_PER_FILE = 5000
"""Rows of one parquet file: at 512 pixels about 4 GB."""

MARK = "export.json"
"""File that says that a folder is an export, and may be replaced by the next one."""

_IDENTITIES: dict[str, tuple[StageName, str]] = {
    "critic_model": ("critiques", "model"),
    "critic_prompt_sha256": ("critiques", "prompt_sha256"),
    "instructor_model": ("instructions", "model"),
    "instructor_prompt_sha256": ("instructions", "prompt_sha256"),
    "editor_model": ("edits", "model"),
    "editor_licence": ("edits", "licence"),
}
"""Details that are the same for all pairs, and which value of the manifest they are."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    form: ExportForm
    num_pairs: int


def export(
    run: str | Path, form: ExportForm = "native", *, to: str | Path | None = None, licence: str | None = None
) -> Exported:
    """Write the pairs of a run, and a dataset card.

    Args:
        run: The run's folder; it need not be at its end.
        to: Folder to write; None for `export/<form>` in that of the run. An earlier export there is replaced.
        licence: Of the data set, for the header of its card; None leaves it open.

    Example:
        >>> export("runs/curate", "parquet").num_pairs                   # doctest: +SKIP
        412
    """
    folder = RunFolder(run)
    target = Path(to) if to is not None else folder.path / "export" / form
    if target.exists() and any(target.iterdir()) and not (target / MARK).is_file():
        raise InputError(f"{target} holds something other than an export; expected a new folder; give another one")
    status = status_of(run)
    if not status.num_pairs:
        raise InputError(_why_none(status))
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    num_pairs = _write(partial, form, edits_of_one(folder) if form == "edits" else pairs_of(folder))
    if not num_pairs:
        raise InputError(
            f"{folder.path} has no two edits of one image that are ordered; expected several of each: curate with "
            "editor.edits_per_image: 2 or more"
        )
    write_dataset_card(partial, folder, status, form, licence)
    write_text(partial / MARK, json.dumps({"form": form, "pairs": num_pairs}) + "\n")
    replace_folder(partial, target)
    return Exported(target, form, num_pairs)


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    push: bool = False,
    private: bool = True,
    token: str | None = None,
    api: HfApi | None = None,
) -> PublishPlan:
    """Say what uploading an exported data set would send; upload it with `push=True`.

    Args:
        repo_id: "owner/name" on the Hub; made if it does not exist.
        token: Of the Hub; None for that of `hf auth login`.
        api: The client to upload with; None for the Hub's own.

    Returns:
        The plan, with the address of the repository if it was carried out.
    """
    folder = Path(folder)
    check_repo_id(repo_id)
    if not (folder / MARK).is_file() or not (folder / CARD).is_file():
        raise InputError(f"{folder} is no exported data set; expected {MARK} and {CARD} in it; run `rpo curate export`")
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARK)
    files = tuple(PlannedFile(path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths)
    refuse_private(folder, [file.path for file in files])
    notes = [] if DatasetCard.load(folder / CARD).data.get("license") else ["the card names no license"]
    plan = PublishPlan(repo_id, private, files, tuple(notes))
    return carry_out(plan, folder, "dataset", token=token, api=api or HfApi()) if push else plan


def pairs_of(run: RunFolder) -> Iterator[PreferencePair]:
    """The pairs that were kept, in the order of the plan; their images are read when they are asked for.

    A pair that comes again, with the same images and caption, is given once.
    """
    common = _common_details(run)
    seen: set[bytes] = set()
    for history in histories(run):
        for outcome in history.outcomes or ():
            if outcome.chosen:
                pair = _pair(run, history, outcome, common)
                said = json.dumps([pair.prompt, str(pair.chosen), str(pair.rejected)])
                if (key := hashlib.sha256(said.encode()).digest()) not in seen:
                    seen.add(key)
                    yield pair


def edits_of_one(run: RunFolder) -> Iterator[PreferencePair]:
    """The pairs whose sides are edits of one image by one instruction, which becomes the prompt."""
    common = _common_details(run)
    for history in histories(run):
        told, source = history.instructions, run.image_path(history.source.image)
        for outcome in history.outcomes or ():
            sides = [name.partition("/") for name in (outcome.first, outcome.second)]
            are_own = all(record == history.source.id and kind != "source" for record, _, kind in sides)
            if outcome.chosen and are_own and isinstance(told, Instructions):
                yield replace(_pair(run, history, outcome, common), prompt=told.text, original=source)


_Side = tuple[History, Candidate]
"""A record, and the image of it that is in a pair."""


def _pair(run: RunFolder, history: History, outcome: Outcome, common: dict[str, str]) -> PreferencePair:
    chosen, rejected = (_side(run, history, name) for name in (outcome.chosen, outcome.rejected))
    paths = [run.image_path(record.image_of(image.kind) or "") for record, image in (chosen, rejected)]
    who, _, name = outcome.label.partition(":")
    scores = [image.scores.get(name) if who == "reward" else None for _, image in (chosen, rejected)]
    seed = history.source.origin.get("seed")
    return PreferencePair(
        history.source.caption,
        chosen=paths[0],
        rejected=paths[1],
        chosen_score=scores[0],
        rejected_score=scores[1],
        source="rpo.curation",
        seed=int(seed) if seed is not None else None,
        details={**common, **_details(history, outcome, chosen, rejected)},
        name=f"record {history.source.id}",
    )


def _details(history: History, outcome: Outcome, chosen: _Side, rejected: _Side) -> dict[str, str | float]:
    (winner, better), (loser, worse) = chosen, rejected
    is_edit = {one.name: one.kind != "source" for one in (better, worse)}
    told = winner if is_edit[better.name] else loser
    details: dict[str, str | float] = {
        "record": history.source.id,
        "chosen_is": "edit" if is_edit[better.name] else "source",
        "rejected_is": "edit" if is_edit[worse.name] else "source",
        "label_source": outcome.label,
    }
    if isinstance(told.critique, Critique):
        details["critique"] = told.critique.model_dump_json()
    if any(is_edit.values()) and isinstance(told.instructions, Instructions):
        details["edit_instruction"] = told.instructions.text
    if better.scores and worse.scores:
        details["scores"] = json.dumps({"chosen": dict(better.scores), "rejected": dict(worse.scores)})
    is_own = winner.source.id == loser.source.id and not all(is_edit.values())
    if is_own and isinstance(told.scores, Scores) and told.scores.distance is not None:
        details["distance"] = told.scores.distance
    return details


def _side(run: RunFolder, history: History, name: str) -> _Side:
    record, _, kind = name.partition("/")
    own = history if record == history.source.id else history_of(run, record)
    edits = {edit.kind: edit for edit in edits_of(own)}
    return own, source_of(own) if kind == "source" else edits.get(kind, Candidate(record, kind, {}))


def _common_details(run: RunFolder) -> dict[str, str]:
    found = {column: run.identity_of(stage).get(key, "") for column, (stage, key) in _IDENTITIES.items()}
    for column in ("critic_model", "instructor_model", "editor_model"):
        found[column] = shown_model(found[column] or run.identity_of(_IDENTITIES[column][0]).get("kind", ""))
    found["generator_model"] = shown_model(run.identity_of("sources").get("model", ""))
    return {column: value for column, value in found.items() if value}


def _write(folder: Path, form: ExportForm, pairs: Iterator[PreferencePair]) -> int:
    """Write pairs as they come, and return how many they were."""
    if form in ("native", "edits"):
        return write_pairs(folder, pairs)
    write = write_parquet if form == "parquet" else write_pickapic
    files: list[Path] = []
    num_pairs = 0
    while shard := list(islice(pairs, PAIRS_PER_FILE)):
        files.append(folder / "data" / f"{len(files):05}.parquet")
        write(files[-1], shard)
        num_pairs += len(shard)
    for index, file in enumerate(files):  # how many there are is only known now
        file.rename(file.with_name(f"train-{index:05}-of-{len(files):05}.parquet"))
    return num_pairs


def _why_none(status: RunStatus) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(status.dropped.items()))
    found = f"dropped: {reasons}" if reasons else "no record has been decided yet"
    return (
        f"{status.path} has no pairs ({found}); expected at least one; let the run go on, give it more images, or "
        "relax decide.rewards and the windows"
    )
