"""The quickstart's report on its pairs: how many images came through each stage, and what the editor made of some."""

from pathlib import Path

import numpy as np

from rpo.curation.curate_config import DecideConfig
from rpo.curation.records import Edit, Instructions, histories, history_of
from rpo.curation.status import RunStatus
from rpo.curation.store.folder import RunFolder
from rpo.evaluation.comparison import OUTCOMES, Outcome, draw_examples, outcomes
from rpo.reports.sections import ImagePair, JudgedImage, PairGroup, PairsSection, TextSection
from rpo.shapes.verifier import verify
from rpo.training.loop import TrainResult

SHOWN: dict[Outcome, int] = {"fixed": 6, "still fails": 3, "broken": 0, "still holds": 0}
"""Edits shown of each outcome."""

MEANINGS: dict[Outcome, str] = {
    "fixed": "the edit shows what the prompt asks for",
    "still fails": "found better, and still wrong",
    "broken": "",
    "still holds": "",
}


def in_words(rules: DecideConfig) -> str:
    """Which images became a pair, in a sentence or two."""
    judges = [f"{name} by {margin:g} or more" if margin else name for name, margin in rules.rewards.items()]
    said = " and ".join(judges) if rules.agreement else f"{judges[0]} (of {' and '.join(judges)})"
    least = "".join(f", and {name} gave the better one at least {mark:g}" for name, mark in rules.min_chosen.items())
    across = " The base's own images of a prompt were paired in the same way, the best with the worst."
    return (
        f"An edit and its source became a pair where {said} told them apart{least} (policy {rules.policy})."
        f"{across if rules.orderings == 'prompt' else ''}"
    )


def yield_section(status: RunStatus, trained: TrainResult, rules: DecideConfig) -> TextSection:
    """How the pairs came about, in numbers."""
    counts = {stage.name: stage.kept for stage in status.stages}
    end = f" Training was stopped: {trained.stopped_because}." if trained.stopped_because else ""
    dropped = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in sorted(status.dropped.items()))
    return TextSection(
        "What it was trained on",
        (
            f"{status.num_pairs} preference pairs, {trained.updates} updates. The base model drew {counts['sources']} "
            "images of the training prompts. A critic that reads the scene said what was wrong with each, an "
            f"instructor what an editor should do about it, and a small InstructPix2Pix made {counts['edits']} edits. "
            f"{in_words(rules)}{end}",
            f"Dropped: {dropped}. Every image with its critique, instruction, scores and decision is in "
            "curate/pairs.html.",
        ),
    )


def edits_section(run: Path, *, seed: int) -> PairsSection:
    """Some of the pairs: the model's image, and what the editor made of it."""
    folder = RunFolder(run)
    kept = [one.source.id for one in histories(folder) if (own := one.own_outcome) is not None and own.chosen]
    verdicts = [(bool(pair.before.holds), bool(pair.after.holds)) for pair in (_pair(folder, one) for one in kept)]
    found = outcomes([before for before, _ in verdicts], [after for _, after in verdicts])
    drawn = draw_examples(found, counts=SHOWN, seed=seed)
    groups = tuple(
        PairGroup(
            outcome,
            found.count(outcome),
            tuple(_pair(folder, kept[index]) for index in drawn[outcome]),
            MEANINGS[outcome],
        )
        for outcome in OUTCOMES
        if found.count(outcome) and SHOWN[outcome]
    )
    selection = (
        f"Drawn at random (seed {seed}) from the {len(kept)} kept edits; below each is what the editor was told. The "
        "verdicts are the verifier's."
    )
    return PairsSection("Images and their edits", groups, selection, before="source", after="edit")


def _pair(folder: RunFolder, record: str) -> ImagePair:
    one = history_of(folder, record)
    assert isinstance(one.edit, Edit)
    sides: list[JudgedImage] = []
    for digest in (one.source.image, one.edit.image):
        pixels = np.asarray(folder.load_image(digest, one.source.id))
        verdict = verify(pixels, one.source.caption)
        sides.append(JudgedImage(pixels, verdict.holds, verdict.reason))
    told = one.instructions.text if isinstance(one.instructions, Instructions) else ""
    return ImagePair(one.source.caption, *sides, label=told)
