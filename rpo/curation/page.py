"""`pairs.html`: a run of curation to leaf through, in one file that needs nothing else.

At the top, how many records came through each step and what became of the others, counted over the whole run. Below, a
selection of records with their images: caption, critique, instructions, scores, decision, faults and what the model
said then. A page cannot hold every image of a large run, so it says how many of how many it shows and how they were
chosen. No text of a record is ever taken for HTML: the records are JSON in which no "<" is left, the script only sets
text, and a content security policy lets no script run but the page's own.
"""

import base64
import hashlib
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rpo.curation.card import shown_model
from rpo.curation.decide import Outcome
from rpo.curation.folder import RunFolder
from rpo.curation.history import Edit, History, histories, history_of, outcomes_in
from rpo.curation.manifest import Identity, read_manifest
from rpo.curation.page_outcomes import (
    FAULT_WORDS,
    KEPT_EDIT,
    KEPT_SOURCE,
    UNDECIDED,
    WORDS,
    Fate,
    count_steps,
    fate_of,
    select,
)
from rpo.curation.page_pictures import AMPLIFICATION, EXACT_SIDE, difference, shown
from rpo.curation.page_records import SEVERITIES, ShownImages, ShownRecord, shown_record
from rpo.errors import InputError
from rpo.text import read_text

MAX_SIDE = 512
"""Longest side of an image in the page."""

PIXEL_BUDGET = 240 * MAX_SIDE**2
"""Pixels of all sources together; with more records each image is smaller."""

TEMPLATES = Path(__file__).parents[1] / "reports" / "templates"

_MAX_STARTS = 30  # first words of instructions to choose from; the search finds the others

_STAGE_NAMES = {
    "sources": "Images",
    "critiques": "Critic",
    "instructions": "Instructor",
    "edits": "Editor",
    "scores": "Scores",
    "decisions": "Decision",
}


def write_page(folder: str | Path, path: str | Path | None = None, *, max_records: int = 400) -> Path:
    """Write the page of a run, finished or not; an older page stays whole until the new one is complete.

    Args:
        path: The file to write; None for `pairs.html` in the folder.
        max_records: Records that are shown with their images; all are counted.

    Example:
        >>> write_page("runs/curate")                                    # doctest: +SKIP
        PosixPath('runs/curate/pairs.html')
    """
    if max_records < 1:
        raise InputError(f"max_records is {max_records}; expected at least 1; leave it out for 400")
    run = RunFolder(folder)
    target = Path(path) if path is not None else run.path / "pairs.html"
    page = render_page(run, max_records)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(target.name + ".partial")
    unfinished.write_bytes(page.encode("utf-8", errors="replace"))
    os.replace(unfinished, target)
    return target


def render_page(run: RunFolder, max_records: int) -> str:
    """The page as HTML text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # here, so that `import rpo` stays quick

    kinds: Counter[Fate] = Counter()
    chosen = select(_counted((fate_of(history) for history in histories(run)), kinds), max_records)
    side = image_side(len(chosen))
    manifest = read_manifest(run.path)
    across, num_across = _outcomes_across(run, {one.record for one in chosen})
    records = [_shown(run, history_of(run, one.record), side, across, manifest) for one in chosen]
    script = read_text(TEMPLATES / "curation.js")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    counts = Counter(one.outcome for one in kinds.elements())
    return environment.get_template("curation.html.j2").render(
        name=run.path.resolve().name,
        summary=_summary(counts, num_across),
        selection=_selection(len(chosen), kinds.total(), records, side),
        steps=count_steps(kinds.elements()),
        words=WORDS,
        choices=_choices(kinds, chosen, records),
        has_records=bool(records),
        amplification=AMPLIFICATION,
        stages=[
            (_STAGE_NAMES.get(stage, stage), sorted((key, shown_model(value)) for key, value in one.items()))
            for stage, one in manifest.items()
        ],
        data=script_json(
            {
                "words": WORDS,
                "severities": SEVERITIES,
                "amplification": AMPLIFICATION,
                "records": [one.data for one in records],
            }
        ),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def script_json(value: object) -> str:
    r"""JSON that can stand in a script element: without "<", nothing in it can end or open an element.

    Example:
        >>> script_json(["</script>"])
        '["\\u003c/script>"]'
    """
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def image_side(num_records: int) -> int:
    """The longest side of images, so that a page of so many records stays within `PIXEL_BUDGET`."""
    side = math.isqrt(PIXEL_BUDGET // max(num_records, 1))
    return max(min(side, MAX_SIDE), EXACT_SIDE)


def _shown(
    run: RunFolder,
    history: History,
    side: int,
    across: Mapping[str, Sequence[Outcome]],
    manifest: Mapping[str, Identity],
) -> ShownRecord:
    name = f"record {history.source.id} ({history.source.caption!r})"
    source = run.load_image(history.source.image, name)
    edit = run.load_image(history.edit.image, name) if isinstance(history.edit, Edit) else None
    images = ShownImages(
        shown(source, side),
        shown(edit, side) if edit is not None else "",
        shown(difference(source, edit), side) if edit is not None else "",
        max(source.size) <= EXACT_SIDE,
        source.size,
    )
    return shown_record(history, images, across.get(history.source.id, ()), manifest)


def _counted(fates: Iterable[Fate], kinds: Counter[Fate]) -> Iterator[Fate]:
    """The same fates, counted by what they are, whichever record has them."""
    for one in fates:
        kinds[replace(one, record="")] += 1
        yield one


def _outcomes_across(run: RunFolder, shown: Collection[str]) -> tuple[dict[str, list[Outcome]], int]:
    """Outcomes of images of two records, by each of the two that is shown; and how many of all became pairs."""
    found: defaultdict[str, list[Outcome]] = defaultdict(list)
    num_pairs = 0
    for row in run.stages["decisions"].rows():
        for outcome in outcomes_in(row):
            owners = {name.partition("/")[0] for name in (outcome.first, outcome.second)}
            if len(owners) > 1:  # written down once, with the first record of a group
                num_pairs += outcome.chosen != ""
                for owner in owners.intersection(shown):
                    found[owner].append(outcome)
    return found, num_pairs


def _summary(counts: Counter[str], num_across: int) -> str:
    total, pairs = sum(counts.values()), counts[KEPT_EDIT] + counts[KEPT_SOURCE]
    if not total:
        return "There are no records yet."
    share = f"{pairs:,} of {total:,} records became preference pairs ({100 * pairs / total:.1f} %)"
    parts = [share, f"in {counts[KEPT_SOURCE]:,} of them the source is preferred" if counts[KEPT_SOURCE] else ""]
    parts.append(f"{num_across:,} further pairs are made across given pairs" if num_across else "")
    parts.append(f"{counts[UNDECIDED]:,} are not decided yet" if counts[UNDECIDED] else "")
    return "; ".join(part for part in parts if part) + "."


def _selection(num_shown: int, total: int, records: Sequence[ShownRecord], side: int) -> str:
    if num_shown == total:
        chosen = f"All {total:,} records are shown."
    else:
        chosen = (
            f"{num_shown:,} of {total:,} records are shown: as equal a number of every outcome and kind of fault as "
            "there are, and of one outcome those with the lowest ids, which are hashes, so that nobody picked them. "
            "The counts above are of all records."
        )
    if any(not record.images.has_pixels for record in records):
        chosen += f" Images are shrunk to {side} pixels and compressed; those in the folder are not."
    return chosen


def _choices(
    kinds: Counter[Fate], chosen: Sequence[Fate], records: Sequence[ShownRecord]
) -> dict[str, list[tuple[str, str, str]]]:
    """The values of each filter that occur: value, words, and how many of how many are shown."""
    totals = Counter(one.outcome for one in kinds.elements())
    outcomes = Counter(one.outcome for one in chosen)
    all_faults = Counter(kind for one in kinds.elements() for kind in set(one.faults))
    faults = Counter(kind for one in chosen for kind in set(one.faults))
    starts = Counter(word for one in records for word in one.starts)
    return {
        "outcome": [(key, WORDS[key][0], _of(outcomes[key], totals[key])) for key in WORDS if outcomes[key]],
        "fault": [(key, FAULT_WORDS[key], _of(faults[key], all_faults[key])) for key in FAULT_WORDS if faults[key]],
        "starts": [(word, f"{word} …", str(count)) for word, count in starts.most_common(_MAX_STARTS)],
    }


def _of(num_shown: int, total: int) -> str:
    return f"{num_shown:,}" if num_shown == total else f"{num_shown:,} of {total:,}"
