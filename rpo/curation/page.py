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
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rpo.curation.card import shown_model
from rpo.curation.fates import FAULT_WORDS, KEPT_EDIT, KEPT_SOURCE, UNDECIDED, WORDS, Fate, count_steps, fate_of, select
from rpo.curation.page_records import AMPLIFICATION, EXACT_SIDE, SEVERITIES, shown_record
from rpo.curation.records import History, Outcome, histories
from rpo.curation.store.run import CurationRun
from rpo.errors import InputError
from rpo.files.text import read_text
from rpo.files.whole import written_whole
from rpo.reports.html import TEMPLATES, environment

PAGE = "pairs.html"

MAX_SIDE = 512
"""Longest side of an image in the page."""

PIXEL_BUDGET = 240 * MAX_SIDE**2
"""Pixels of all sources together; with more records each image is smaller."""

_MAX_STARTS = 30  # first words of instructions to choose from; the search finds the others


def write_page(folder: str | Path, path: str | Path | None = None, *, max_records: int = 400) -> str:
    """Write the page of a run, finished or not; an older page stays whole until the new one is complete.

    Args:
        path: The file to write; None for `pairs.html` in the run.
        max_records: Records that are shown with their images; all are counted.

    Returns:
        Where the page is.

    Example:
        >>> write_page("runs/curate")                                    # doctest: +SKIP
        'runs/curate/pairs.html'
    """
    if max_records < 1:
        raise InputError(f"max_records is {max_records}; expected at least 1; leave it out for 400")
    run = CurationRun(folder)
    page = render_page(run, max_records).encode("utf-8", errors="replace")
    if path is None:
        run.store.write(PAGE, page)
        return run.store.place(PAGE)
    with written_whole(Path(path)) as partial:
        partial.write_bytes(page)
    return str(path)


def render_page(run: CurationRun, max_records: int) -> str:
    """The page as HTML text."""
    kinds: Counter[Fate] = Counter()
    chosen = select(_counted((fate_of(history) for history in histories(run)), kinds), max_records)
    side = image_side(len(chosen))
    identities = run.identities()
    shown, across, num_across = _shown(run, {one.record for one in chosen})
    records = [shown_record(run, one, side, across.get(one.source.id, ()), identities) for one in shown]
    script = read_text(TEMPLATES / "curation.js")
    page_data = {"words": WORDS, "severities": SEVERITIES, "amplification": AMPLIFICATION, "records": records}
    counts = Counter(one.outcome for one in kinds.elements())
    return (
        environment()
        .get_template("curation.html.j2")
        .render(
            name=Path(run.store.address).resolve().name,
            kept_edits=counts[KEPT_EDIT],
            kept_sources=counts[KEPT_SOURCE],
            undecided=counts[UNDECIDED],
            across=num_across,
            num_shown=len(chosen),
            is_shrunk=not all(one["images"]["has_pixels"] for one in records),
            side=side,
            steps=count_steps(kinds.elements()),
            words=WORDS,
            choices=_choices(kinds, chosen, records),
            amplification=AMPLIFICATION,
            stages={
                stage: sorted((key, shown_model(value)) for key, value in one.items())
                for stage, one in identities.items()
            },
            data=script_json(page_data),
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
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


def _counted(fates: Iterable[Fate], kinds: Counter[Fate]) -> Iterator[Fate]:
    """The same fates, counted by what they are, whichever record has them."""
    for one in fates:
        kinds[replace(one, record="")] += 1
        yield one


def _shown(run: CurationRun, chosen: Collection[str]) -> tuple[list[History], dict[str, list[Outcome]], int]:
    """Records that are shown; outcomes of images of two records, by each that is shown; how many became pairs."""
    shown, found = list[History](), defaultdict[str, list[Outcome]](list)
    num_pairs = 0
    for history in histories(run):
        if history.source.id in chosen:
            shown.append(history)
        for outcome in history.outcomes or ():
            owners = {name.partition("/")[0] for name in (outcome.first, outcome.second)}
            if len(owners) > 1:  # written down once, with the first record of a group
                num_pairs += outcome.chosen != ""
                for owner in owners.intersection(chosen):
                    found[owner].append(outcome)
    return shown, found, num_pairs


def _choices(
    kinds: Counter[Fate], chosen: Sequence[Fate], records: Sequence[Mapping[str, Any]]
) -> dict[str, list[tuple[str, str, str]]]:
    """The values of each filter that occur: value, words, and how many of how many are shown."""
    totals = Counter(one.outcome for one in kinds.elements())
    outcomes = Counter(one.outcome for one in chosen)
    all_faults = Counter(kind for one in kinds.elements() for kind in set(one.faults))
    faults = Counter(kind for one in chosen for kind in set(one.faults))
    starts = Counter(word for one in records for word in one["starts"])
    return {
        "outcome": [(key, WORDS[key][0], _of(outcomes[key], totals[key])) for key in WORDS if outcomes[key]],
        "fault": [(key, FAULT_WORDS[key], _of(faults[key], all_faults[key])) for key in FAULT_WORDS if faults[key]],
        "starts": [(word, f"{word} …", str(count)) for word, count in starts.most_common(_MAX_STARTS)],
    }


def _of(num_shown: int, total: int) -> str:
    return f"{num_shown:,}" if num_shown == total else f"{num_shown:,} of {total:,}"
