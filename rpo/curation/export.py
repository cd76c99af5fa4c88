"""Curated pairs for training and for others: every pair with how it came to be.

Four forms: "native" is a folder of images with `metadata.jsonl`, "parquet" the same as a table, "pickapic" a table
with the columns of Pick-a-Pic; "edits" is such a folder for an editing model: source, instruction, better and worse
edit. Each appears whole or not at all, in the order of the plan, with a card beside it.

Pairs stream from shard to file, so that the memory does not grow with their number. Several runs become one set, mixed
by shares; near-duplicates of an earlier image may be left out.

An upload to the Hugging Face Hub is a plan first, which lists every file that would be sent; nothing else is sent.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Literal

from huggingface_hub import DatasetCard, HfApi

from rpo.curation.card import shown_model, write_dataset_card
from rpo.curation.decide import Candidate, edits_of, source_of
from rpo.curation.mix import Found, Mix, is_of_one_image
from rpo.curation.records import Critique, History, Instructions, Outcome, Scores, encoded_of, history_of
from rpo.curation.status import RunStatus, status_of
from rpo.curation.store.mark import StageName
from rpo.curation.store.run import CurationRun
from rpo.curation.store.shard import Shard
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
    sources: Mapping[str, int]
    """Pairs of each run."""
    left_out: Mapping[str, int]
    """Pairs that were not written, by reason: see `WORDS`."""

    def __str__(self) -> str:
        """What was written, for the terminal."""
        lines = [f"{self.num_pairs} pairs in {self.path}"]
        lines += [f"  {count:8d}  of {name}" for name, count in self.sources.items() if len(self.sources) > 1]
        lines += [f"  {count:8d}  left out: {WORDS[why]}" for why, count in self.left_out.items() if count]
        return "\n".join(lines)


WORDS = {
    "near_duplicate": "the image looks like an earlier one",
    "same": "the same caption and images again",
    "share": "beyond the share of their run",
}
"""Why pairs were left out."""


def export(
    run: str | Path | Mapping[str, float],
    form: ExportForm = "native",
    *,
    to: str | Path | None = None,
    licence: str | None = None,
    near_duplicates: int | None = None,
) -> Exported:
    """Write the pairs of a run, or a mix of several, and a dataset card.

    Args:
        run: Where the run is; it need not be at its end. Or several, each with its share of the pairs: as many are
            taken as the scarcest allows, evenly from each.
        to: Folder to write; None for `export/<form>` in that of the run. An earlier export there is replaced.
        licence: Of the data set, for the header of its card; None leaves it open.
        near_duplicates: Bits of 64 in which the difference hashes of two source images differ at most if the second is
            left out: 0 to 4 find the same picture in another size or compression. None leaves nothing out.

    Example:
        >>> export("runs/curate", "parquet").num_pairs                   # doctest: +SKIP
        412
        >>> export({"runs/photos": 3, "runs/paintings": 1}, to="mixed")  # doctest: +SKIP
    """
    given = run if isinstance(run, Mapping) else {run: 1.0}
    shares = {str(address): float(share) for address, share in given.items()}
    _check_shares(shares)
    runs = [CurationRun(address) for address in shares]
    target = _target(runs, form, to)
    statuses = [status_of(address) for address in shares]
    if empty := [status for status in statuses if not status.num_pairs]:
        raise InputError(_why_none(empty[0]))
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    wants = is_of_one_image if form == "edits" else None
    mix = Mix(runs, list(shares.values()), wants=wants, near_duplicates=near_duplicates)
    num_pairs = _write(partial, form, _pairs(mix, is_of_edits=form == "edits"))
    if not num_pairs:
        raise InputError(
            f"{runs[0].store.address} has no two edits of one image that are ordered; expected several of each: curate "
            "with editor.edits_per_image: 2 or more"
        )
    sources = dict(zip(shares, mix.written, strict=True))
    left_out = {why: count for why, count in mix.left_out.items() if count}
    write_dataset_card(partial, list(zip(runs, statuses, mix.written, strict=True)), left_out, form, licence)
    told = {"form": form, "pairs": num_pairs, "left_out": left_out}
    write_text(partial / MARK, json.dumps(told) + "\n")
    replace_folder(partial, target)
    return Exported(target, form, num_pairs, sources, left_out)


def _check_shares(shares: Mapping[str, float]) -> None:
    if wrong := [f"{address}: {share:g}" for address, share in shares.items() if not 0 < share < float("inf")]:
        raise InputError(f"a share is {wrong[0]}; expected a number above 0 for each run; leave the run out")


def _target(runs: Sequence[CurationRun], form: ExportForm, to: str | Path | None) -> Path:
    folder = runs[0].store.folder
    if to is None and (len(runs) > 1 or folder is None):
        raise InputError(
            f"{' and '.join(run.store.address for run in runs)} shall be exported, but not where to; expected a folder "
            "on this disk; give --to DIR (to=…)"
        )
    target = Path(to) if to is not None else Path(runs[0].store.address) / "export" / form
    if target.exists() and any(target.iterdir()) and not (target / MARK).is_file():
        raise InputError(f"{target} holds something other than an export; expected a new folder; give another one")
    return target


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


def pairs_of(run: CurationRun) -> Iterator[PreferencePair]:
    """The pairs that were kept, in the order of the plan.

    A pair that comes again, with the same images and caption, is given once.
    """
    return _pairs(Mix([run], [1.0]), is_of_edits=False)


def _pairs(mix: Mix, *, is_of_edits: bool) -> Iterator[PreferencePair]:
    common = {id(run): _common_details(run) for run in mix.runs}
    for found in mix:
        pair = _pair(found, common[id(found.run)])
        if is_of_edits:
            assert isinstance(told := found.history.instructions, Instructions)
            pair = replace(pair, prompt=told.text, original=encoded_of(found.run, found.history, "source"))
        yield pair


_Side = tuple[History, Candidate]
"""A record, and the image of it that is in a pair."""


def _pair(found: Found, common: dict[str, str]) -> PreferencePair:
    history, outcome = found.history, found.outcome
    chosen, rejected = (_side(found.shard, history, name) for name in (outcome.chosen, outcome.rejected))
    images = [encoded_of(found.run, record, image.kind) for record, image in (chosen, rejected)]
    who, _, name = outcome.label.partition(":")
    scores = [image.scores.get(name) if who == "reward" else None for _, image in (chosen, rejected)]
    seed = history.source.origin.get("seed")
    return PreferencePair(
        history.source.caption,
        chosen=images[0],
        rejected=images[1],
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


def _side(shard: Shard, history: History, name: str) -> _Side:
    record, _, kind = name.partition("/")
    own = history if record == history.source.id else history_of(shard, record)
    edits = {edit.kind: edit for edit in edits_of(own)}
    return own, source_of(own) if kind == "source" else edits.get(kind, Candidate(record, kind, {}))


def _common_details(run: CurationRun) -> dict[str, str]:
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

    def counted(some: Iterator[PreferencePair]) -> Iterator[PreferencePair]:
        nonlocal num_pairs
        for pair in some:
            num_pairs += 1
            yield pair

    while (first := next(pairs, None)) is not None:
        files.append(folder / "data" / f"{len(files):05}.parquet")
        write(files[-1], counted(islice(chain([first], pairs), PAIRS_PER_FILE)))
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
