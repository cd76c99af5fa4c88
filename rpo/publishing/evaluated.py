"""What an evaluation says of a LoRA or a pipeline, in its card and beside it: only if it is of these very weights.

README.md          a section with the numbers, in place of that of an earlier evaluation
evaluation.json    the evaluation itself, which has no path of this machine
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rpo.adapters.lora_file import WEIGHT_FILE, inspect_lora
from rpo.errors import InputError
from rpo.evaluation.contest import Contest
from rpo.evaluation.result import RESULT, Evaluation, read_evaluation
from rpo.files.text import read_text
from rpo.files.whole import write_whole
from rpo.publishing.model_card import NOT_MEASURED, template

BEGIN, END = "<!-- evaluation -->", "<!-- end of evaluation -->"
"""Around the section, so that another evaluation takes its place."""

BEFORE = "\n## Training"
"""The section that it is put before."""


def add_evaluation(folder: Path, evaluation: Path) -> None:
    """Put an evaluation into the card of a LoRA.

    Args:
        folder: With the LoRA and its card.
        evaluation: Folder or file of an evaluation that had this LoRA.

    Raises:
        InputError: The evaluation is of other weights, or there is no card.
    """
    found, card = read_evaluation(evaluation), folder / "README.md"
    model = _entry(found, folder, evaluation)
    if not card.is_file():
        raise InputError(
            f"{folder} has no model card README.md; expected one, to put the evaluation into; save it again"
        )
    text = re.sub(rf"{BEGIN}.*?{END}\n\n?", "", read_text(card), flags=re.DOTALL).replace(f"- {NOT_MEASURED}\n", "")
    before, heading, after = text.partition(BEFORE)
    section = f"{BEGIN}\n{section_of(found, model)}{END}\n"
    write_whole(card, f"{before.rstrip()}\n\n{section}{heading}{after}")
    source = evaluation / RESULT if evaluation.is_dir() else evaluation
    if source.resolve() != (folder / RESULT).resolve():
        shutil.copyfile(source, folder / RESULT)


def section_of(found: Evaluation, model: Mapping[str, Any]) -> str:
    """The section of a card, in Markdown."""
    base, own = found.models[0]["label"], model["label"]
    best = next((one["label"] for one in found.models if one["kind"] == "best-of"), "")
    return template("evaluated.md.j2").render(
        pinned=found.pinned,
        model=model,
        rows=[(one.by, one.rows) for one in found.of(base, own)],
        best=[(one.by, one.rows[0]) for one in found.of(best, own)],
        diversity=[(one.by, one.rows[0]) for one in found.of(base, own, among=found.diversity)],
        several=len({one["category"] for one in found.pinned["prompts"]["list"]}) > 1,
        said=_said,
        file=RESULT,
    )


def _said(one: Contest) -> tuple[str, ...]:
    """Means, difference with its interval, and win rate with its own, as cells."""
    gain, rate = one.means.gain, one.win_rate
    return (
        f"{one.means.before.value:.4g}",
        f"{one.means.after.value:.4g}",
        f"{gain.value:+.3g} [{gain.low:+.3g}, {gain.high:+.3g}]",
        f"{100 * rate.value:.0f} % [{100 * rate.low:.0f}, {100 * rate.high:.0f}]",
    )


def _entry(found: Evaluation, folder: Path, evaluation: Path) -> Mapping[str, Any]:
    """What of an evaluation these weights are."""
    if not (folder / WEIGHT_FILE).is_file():
        raise InputError(
            f"{folder} has no {WEIGHT_FILE}; expected a LoRA, whose hash tells that the evaluation is of it; name the "
            "evaluation of a whole pipeline in its card by hand"
        )
    key = inspect_lora(folder).key
    own = [one for one in found.models if one["hashes"].get("content") == key]
    if not own:
        labels = ", ".join(one["label"] for one in found.models)
        raise InputError(
            f"{evaluation} evaluated {labels}, but not the LoRA in {folder}: its content is {key[:16]}; expected "
            "numbers of these very weights; evaluate them"
        )
    return next((one for one in own if one["strength"] == 1), own[0])
