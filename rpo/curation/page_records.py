"""One record as the page shows it: every text ready to be read, every number already written, images as addresses.

The browser only lays out what is here, so that what a person reads is decided, and tested, in one place. Small images,
such as those of the embedded world, stay as they are, pixel for pixel; photographs are shrunk and compressed. The
difference is taken of the original pixels, so that compression does not show in it.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from rpo.curation.fates import FAULT_WORDS, UNDECIDED, WORDS, fate_of, faults_of
from rpo.curation.records import Critique, Edit, History, Instructions, Outcome, Scores, image_of
from rpo.curation.store.mark import Identity
from rpo.curation.store.run import CurationRun
from rpo.reports.html import data_uri

Facts = list[tuple[str, str]]
"""Names and values."""

SEVERITIES = {1: "blemish", 2: "serious", 3: "contradicts the caption"}

AMPLIFICATION = 4
"""Factor of the difference: a change by a quarter of the range is as bright as can be."""

EXACT_SIDE = 128
"""Images up to this side are kept as PNG, larger ones as WebP."""

_QUALITY = 80
_HASH_CHARACTERS = 12  # of a sha256: enough to recognise it by
_DECIMALS = ((10, 3), (1000, 2))
_FEW = 5e-4  # below, three decimals would show a change as none


def shown_record(
    run: CurationRun, history: History, side: int, across: Sequence[Outcome], identities: Mapping[str, Identity]
) -> dict[str, Any]:
    """What the page says of a record, as JSON takes it.

    Args:
        side: Longest side of its images.
        across: Outcomes of its images together with those of other records.
    """
    outcome, scores, record = history.own_outcome, history.scores, history.source.id
    judge = identities.get("scores", {}).get("evaluation") or "evaluation"
    told = history.instructions.instructions if isinstance(history.instructions, Instructions) else None
    return {
        "id": record,
        "caption": history.source.caption,
        "outcome": fate_of(history).outcome,
        "because": _because(outcome) if outcome is not None and outcome.chosen else "",
        "images": _images(run, history, side),
        "critique": history.critique.model_dump(mode="json") if isinstance(history.critique, Critique) else None,
        "instructions": told,
        "starts": list(dict.fromkeys(text.split()[0].lower() for text in told or ())),
        "faults": [
            {"of": name, "kind": one.kind, "words": FAULT_WORDS[one.kind], "message": one.message, "raw": one.raw}
            for name, one in faults_of(history)
        ],
        "scores": _scores(scores, judge) if isinstance(scores, Scores) else [],
        "measures": _measures(scores) if isinstance(scores, Scores) else [],
        "others": [_in_words(one, record) for one in across],
        "provenance": _provenance(history, identities),
    }


def written(value: float) -> str:
    """A score as people read it: three decimals, fewer for large numbers, two digits for tiny ones."""
    if value == 0:
        return "0"
    if abs(value) < _FEW:
        return f"{value:.1e}".replace("-", "−")
    decimals = next((number for limit, number in _DECIMALS if abs(value) < limit), 0)
    return f"{value:.{decimals}f}".replace("-", "−")


def _images(run: CurationRun, history: History, side: int) -> dict[str, object]:
    source = image_of(run, history, "source")
    edit = image_of(run, history, "edit") if isinstance(history.edit, Edit) else None
    return {
        "source": shown(source, side),
        "edit": shown(edit, side) if edit is not None else "",
        "difference": shown(difference(source, edit), side) if edit is not None else "",
        "has_pixels": max(source.size) <= EXACT_SIDE,  # small enough to be enlarged without blur
        "size": source.size,
    }


def _scores(scores: Scores, judge: str) -> list[dict[str, str]]:
    edit = scores.edit
    found = [_score(name, "filter", value, edit[name] if edit else None) for name, value in scores.source.items()]
    judged = scores.evaluation
    return found + ([_score(judge, "evaluates, never decides", judged["source"], judged.get("edit"))] if judged else [])


def _score(name: str, role: str, source: float, edit: float | None) -> dict[str, str]:
    change = 0.0 if edit is None else edit - source
    direction = "up" if change > 0 else "down" if change < 0 else "same"
    shown = {"name": name, "role": role, "source": written(source), "edit": "", "change": "", "direction": ""}
    if edit is None:
        return shown
    sign = "+" if change > 0 else ""
    return shown | {"edit": written(edit), "change": sign + written(change), "direction": direction}


def _measures(scores: Scores) -> Facts:
    found = {"mean difference of the pixels": scores.distance, "cosine of the embeddings": scores.similarity}
    return [(name, written(value)) for name, value in found.items() if value is not None]


def _because(outcome: Outcome) -> str:
    kind, _, name = outcome.label.partition(":")
    words = {"reward": f"{name} says so", "edit": "the policy says so", "given": "the pair came with this label"}
    return words.get(kind, outcome.label)


def _in_words(outcome: Outcome, record: str) -> str:
    def named(image: str) -> str:
        owner, _, kind = image.partition("/")
        return f"this {kind}" if owner == record else f"the {kind} of {owner}"

    if outcome.chosen:
        return f"{named(outcome.chosen)} preferred to {named(outcome.rejected)} ({_because(outcome)})"
    reason = WORDS[outcome.reason or UNDECIDED][0]
    return f"{named(outcome.first)} and {named(outcome.second)}: no pair, {reason}"


def _provenance(history: History, identities: Mapping[str, Identity]) -> Facts:
    source, edit = history.source, history.edit
    asked = {"critic": history.critique, "instructor": history.instructions, "editor": edit}
    stages = {"critic": "critiques", "instructor": "instructions", "editor": "edits"}
    facts = [("record", source.id), ("source", ", ".join(f"{name} {value}" for name, value in source.origin.items()))]
    facts += [(name, who(identities.get(stages[name], {}))) for name, result in asked.items() if result is not None]
    if source.group != source.id:
        facts.append(("done together with", f"{source.group}, as its {source.side} side"))
    facts.append(("source image", source.image))
    if isinstance(edit, Edit):
        facts += [("edit image", edit.image), ("seed of the edit", str(edit.seed))]
    return facts


def who(identity: Identity) -> str:
    """A component in a line: kind, model, revision, and the start of the hash of its prompt."""
    parts = [identity.get("kind", "of one's own"), identity.get("model", "")]
    if identity.get("revision"):
        parts.append(f"revision {identity['revision'][:_HASH_CHARACTERS]}")
    if identity.get("prompt_sha256"):
        parts.append(f"prompt {identity['prompt_sha256'][:_HASH_CHARACTERS]}…")
    return ", ".join(part for part in parts if part)


def shown(image: Image.Image, side: int) -> str:
    """An image as a `data:` address.

    Args:
        side: Longest side that a larger image is shrunk to; at least `EXACT_SIDE`.
    """
    if max(image.size) <= EXACT_SIDE:
        return data_uri(np.asarray(image))
    small, buffer = image.copy(), io.BytesIO()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    small.save(buffer, "WEBP", quality=_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def difference(first: Image.Image, second: Image.Image) -> Image.Image:
    """The absolute difference of two RGB images of one size, times `AMPLIFICATION`; black where nothing changed.

    Example:
        >>> difference(Image.new("RGB", (1, 1), (9, 0, 0)), Image.new("RGB", (1, 1), (4, 0, 90))).getpixel((0, 0))
        (20, 0, 255)
    """
    one, other = (np.asarray(image, np.int16) for image in (first, second))
    return Image.fromarray((np.abs(one - other) * AMPLIFICATION).clip(0, 255).astype(np.uint8))
