"""The page of an evaluation, and what came of it in a few lines: differences first, then the images behind them."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rpo.evaluation.contest import Contest
from rpo.evaluation.result import Compared, Evaluation
from rpo.reports.html import Report, write_report
from rpo.reports.sections import (
    ContestGroup,
    ContestRow,
    ContestsSection,
    FactsSection,
    Lineup,
    LineupGroup,
    LineupImage,
    LineupsSection,
    Scale,
    Section,
    TextSection,
)
from rpo.runs.evaluate_store import Kept

SHOWN = 6
"""Wins, and losses, of each model."""

ABOVE, BELOW, UNCLEAR = "above", "below", "unclear"


def write_evaluation_report(found: Evaluation, kept: Kept, path: Path) -> Path:
    """Write the page."""
    best, several = _of_kind(found, "best-of"), found.pinned["sampling"]["images_per_prompt"] > 1
    sections: list[Section | None] = [
        _against_the_base(found),
        _best_of(found) if best else None,
        _against_each_other(found),
        _by_category(found),
        _diversity(found) if several else None,
        lineups_of(found, kept),
        _how_to_read(found),
        _facts(found),
    ]
    title = f"{_listed([one['label'] for one in _trained(found)])} against {found.models[0]['source']}"
    title = title[0].upper() + title[1:]
    report = Report(title, summary_of(found), tuple(one for one in sections if one), subtitle="rpo evaluate")
    return write_report(report, path)


def in_words(found: Evaluation) -> str:
    """Every model against the base by every reward, a line each, for the terminal."""
    lines = ["difference from the base, [95 % interval over prompts], and share of images that win (a tie counts half)"]
    for one in found.compared:
        if one.before == found.models[0]["label"]:
            scale = _scale(found, one.by, [one.rows[0]])
            lines.append(f"{one.after}: {one.by} {_said(scale, one.rows[0])}")
    return "\n".join(lines)


def summary_of(found: Evaluation) -> str:
    """The same in a sentence, by the first reward that judges each."""
    base, prompts = found.models[0]["label"], found.prompts
    told = list[str]()
    for model in _trained(found):
        first = next(iter(found.of(base, model["label"])))
        scale = _scale(found, first.by, [first.rows[0]])
        told.append(f"{model['label']}: {first.by} {_said(scale, first.rows[0])}")
    drawn = f"{len(prompts)} images of {len(set(prompts))} prompts by each model, from the same noise for all"
    return f"{drawn}. {'; '.join(told)}."


def _said(scale: Scale, one: Contest) -> str:
    gain, rate = one.means.gain, one.win_rate
    wins = f"wins {100 * rate.value:.0f} % [{100 * rate.low:.0f}, {100 * rate.high:.0f}]"
    return f"{scale.gain(gain).strip()} [{scale.gain_range(gain)}], {wins}"


def _against_the_base(found: Evaluation) -> ContestsSection:
    base = found.models[0]["label"]
    own = [one for one in found.compared if one.before == base]
    groups = _groups(found, own, lambda one: one.after)
    return ContestsSection("Against the base", groups, before=base, after="this one", explains=True)


def _against_each_other(found: Evaluation) -> ContestsSection | None:
    labels = {one["label"] for one in _trained(found)}
    own = [one for one in found.compared if {one.before, one.after} <= labels]
    if not own:
        return None
    groups = _groups(found, own, lambda one: f"{one.after} against {one.before}")
    return ContestsSection("Against each other", groups, before="the other", after="this one")


def _by_category(found: Evaluation) -> ContestsSection | None:
    base, labels = found.models[0]["label"], {one["label"] for one in _trained(found)}
    groups = list[ContestGroup]()
    for one in found.compared:
        if one.before == base and one.after in labels and len(one.rows) > 1:
            title = one.by if len(labels) == 1 else f"{one.after}: {one.by}"
            rows = tuple(ContestRow(row.means.name.replace("_", " "), row) for row in one.rows[1:])
            groups.append(ContestGroup(title, rows, _scale(found, one.by, one.rows[1:])))
    if not groups:
        return None
    note = (
        "The more categories there are, the more of them look clear by chance: of twenty without a difference, one. "
        "A category that matters deserves prompts of its own, and an evaluation of its own."
    )
    return ContestsSection("By category", tuple(groups), before=base, after="this one", note=note)


def _best_of(found: Evaluation) -> ContestsSection | TextSection:
    """Whether plain best-of-N would have done as well, by the rewards that did not choose."""
    best, by = _of_kind(found, "best-of")[0]["label"], found.pinned["best_of"]["by"]
    count = found.pinned["best_of"]["count"]
    own = [one for one in found.compared if one.before == best]
    cost = (
        f"The base draws {count} images for each that it hands out, {by} is asked of each of them, and the one that it "
        f"likes most is kept. This costs {count} times the images of a LoRA every time that an image is wanted, and no "
        f"training. {by} chose, so it does not judge here."
    )
    if not own:
        return TextSection(f"What {best} costs", (cost,))
    answers = [verdict_on(found, label, best) for label in dict.fromkeys(one.after for one in own)]
    groups = _groups(found, own, lambda one: f"{one.after} against {best}")
    title = f"Would {best} have done as well?"
    return ContestsSection(title, groups, before=best, after="this one", note=cost, lead=" ".join(answers))


def verdict_on(found: Evaluation, label: str, best: str) -> str:
    """Whether a model does more than best-of-N, in a sentence."""
    places: dict[str, list[str]] = {ABOVE: [], BELOW: [], UNCLEAR: []}
    for one in found.of(best, label):
        gain = one.rows[0].means.gain
        places[ABOVE if gain.is_above_zero else BELOW if gain.is_below_zero else UNCLEAR].append(one.by)
    above, below = _listed(places[ABOVE]), _listed(places[BELOW])
    rest = f"; {_listed(places[UNCLEAR])} cannot tell them apart" if places[UNCLEAR] else ""
    if above and below:
        return f"By {above} {label} does more than {best}, by {below} less{rest}."
    if above:
        return f"{label[0].upper() + label[1:]} does more than {best} would have, by {above}{rest}."
    if below:
        return f"Yes, and better than {label}, by {below}{rest}."
    return f"As far as these prompts tell, yes: {_listed(places[UNCLEAR])} cannot tell {label} from {best}."


def _diversity(found: Evaluation) -> ContestsSection:
    base = found.models[0]["label"]
    own = [one for one in found.diversity if one.before == base]
    names = {one.by: "pixels" if one.by == "pixels" else f"embedding of {one.by}" for one in own}
    groups = tuple(
        ContestGroup(
            names[by],
            tuple(ContestRow(one.after, one.rows[0]) for one in own if one.by == by),
            _scale(found, "", [one.rows[0] for one in own if one.by == by]),
        )
        for by in names
    )
    note = (
        "The mean distance between two images of one prompt: of pixels from 0 to 1, and 1 − cos of embeddings. Less "
        "than the base's means that images of a prompt have become more alike."
    )
    return ContestsSection(
        "Diversity within a prompt", groups, before=base, after="this one", note=note, counts_wins=False
    )


def _groups(found: Evaluation, own: Sequence[Compared], name: Callable[[Compared], str]) -> tuple[ContestGroup, ...]:
    groups = list[ContestGroup]()
    for by in dict.fromkeys(one.by for one in own):
        some = [one for one in own if one.by == by]
        rows = tuple(ContestRow(name(one), one.rows[0]) for one in some)
        groups.append(ContestGroup(by, rows, _scale(found, by, [one.rows[0] for one in some])))
    return tuple(groups)


def _scale(found: Evaluation, by: str, rows: Sequence[Contest]) -> Scale:
    """How the numbers of a reward are written: per cent where it says yes or no, else with two digits of the interval.

    Args:
        by: The reward; empty for a measure that is none.
    """
    scores = [own[by] for own in found.scores.values() if by in own]
    return scale_of(rows, is_share=bool(scores) and all(value in (0.0, 1.0) for own in scores for value in own))


def scale_of(rows: Sequence[Contest], *, is_share: bool) -> Scale:
    """How differences are written: in per cent, or with two digits of the narrowest interval; drawn around zero."""
    ends = [abs(end) for row in rows for end in (row.means.gain.low, row.means.gain.high) if math.isfinite(end)]
    farthest = max(ends, default=0.0) * 1.05 or 1.0
    if is_share:
        return Scale(100, "%", "points", 1, -farthest, farthest)
    widths = [row.means.gain.high - row.means.gain.low for row in rows]
    narrowest = min((width / 2 for width in widths if math.isfinite(width) and width > 0), default=0.01)
    return Scale(1, "", "", int(np.clip(1 - math.floor(math.log10(narrowest)), 0, 6)), -farthest, farthest)


def lineups_of(found: Evaluation, kept: Kept) -> LineupsSection:
    """The images by which each model is farthest above and below the base."""
    base = found.models[0]["label"]
    first = next(iter(found.of(base, _trained(found)[0]["label"]))).by
    groups = list[LineupGroup]()
    for model in _trained(found):
        label = model["label"]
        differences = {by: np.subtract(found.scores[label][by], found.scores[base][by]) for by in found.scores[base]}
        others = [one / (one.std() or 1.0) for by, one in differences.items() if by != first]
        order = np.lexsort((-np.sum([np.zeros(len(found.prompts)), *others], axis=0), -differences[first]))
        for name, sign, best_first in (("wins", 1, order), ("losses", -1, order[::-1])):
            own = [int(one) for one in best_first if np.sign(differences[first][one]) == sign]
            shown = tuple(_lineup(found, kept, one) for one in own[:SHOWN])
            meaning = f"{len(shown)} of {len(own)} images on which {first} is {'higher' if sign > 0 else 'lower'}"
            groups.append(LineupGroup(f"{label}: largest {name}", shown, meaning))
    selection = (
        f"Sorted by the difference of {first} from the base, and among equal ones by the other rewards. These are the "
        "ends and not the usual: what most images are like is in the folder images/."
    )
    return LineupsSection("Largest wins and losses", tuple(groups), selection)


def _lineup(found: Evaluation, kept: Kept, number: int) -> Lineup:
    base, per_prompt = found.models[0]["label"], found.pinned["sampling"]["images_per_prompt"]
    prompt, image = divmod(number, per_prompt)
    images = list[LineupImage]()
    for model in found.models:
        label, own = model["label"], (model["label"], image)
        if model["kind"] == "best-of":
            own = base, found.chosen[number]
        pixels = kept.read([kept.file(own[0], prompt, own[1])])[0]
        words = tuple(f"{by} {scores[number]:.4g}" for by, scores in found.scores[label].items())
        images.append(LineupImage(label, pixels, words))
    which = f", image {image}" if per_prompt > 1 else ""
    return Lineup(found.prompts[number], tuple(images), f"{found.categories[number].replace('_', ' ')}{which}")


def _how_to_read(found: Evaluation) -> TextSection:
    judges = len(found.pinned["rewards"])
    terms = (
        ("Difference", "The mean over images of this model's score less the other's, on the same prompt and noise."),
        ("Interval", "95 %, over prompts: images of one prompt count together. Other prompts of this kind would give a "
                     "difference within it in 19 of 20 such evaluations. An interval that holds 0 is no difference."),
        ("Wins", "The share of images that score higher than the same one of the other model; a tie counts half, so "
                 "that 50 % is no difference. It does not say by how much."),
        ("Several judges", f"{judges} here. A model that was trained on one of them is best judged by the others."),
    )  # fmt: skip
    return TextSection("How to read this", (), terms)


def _facts(found: Evaluation) -> FactsSection:
    pinned = found.pinned
    prompts = pinned["prompts"]
    models = tuple((one["label"], _model_in_words(one)) for one in found.models)
    sets = (("set", prompts["source"]), ("prompts", str(len(prompts["list"]))), ("sha256", prompts["sha256"][:16]))
    sampling = tuple((name.replace("_", " "), str(value)) for name, value in pinned["sampling"].items())
    groups = (
        ("Models", models),
        ("Prompts", sets),
        ("How images are drawn", sampling),
        ("Rewards and their versions", tuple(pinned["rewards"].items())),
        ("Made with", tuple((name, str(value)) for name, value in pinned["made_with"].items())),
    )
    return FactsSection("What makes the numbers comparable", groups)


def _model_in_words(model: Mapping[str, Any]) -> str:
    hashes = model["hashes"]
    mark = hashes.get("content") or next((value for name, value in hashes.items() if name.startswith("base.")), "")
    strength = f" at {model['strength']:g}" if model.get("strength", 1) != 1 else ""
    return f"{model['source']}{strength}, {mark[:16]}"


def _trained(found: Evaluation) -> Sequence[Mapping[str, Any]]:
    """LoRAs and checkpoints; where there is none, what best-of-N made of the base."""
    return [one for one in found.models[1:] if one["kind"] != "best-of"] or found.models[1:]


def _of_kind(found: Evaluation, kind: str) -> list[Mapping[str, Any]]:
    return [one for one in found.models if one["kind"] == kind]


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
