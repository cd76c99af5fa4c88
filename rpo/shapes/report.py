"""The report's sections about two shapes evaluations: the numbers, the kinds of prompt, and images before and after."""

from collections.abc import Mapping

from rpo.evaluation.comparison import OUTCOMES, Outcome, PairedComparison, draw_examples, outcomes
from rpo.evaluation.held_out import Judged, check_comparable
from rpo.reports.sections import (
    ImagePair,
    JudgedImage,
    NumbersSection,
    PairGroup,
    PairsSection,
    TableGroup,
    TableSection,
)
from rpo.shapes.evaluate import ShapesEvaluation, comparisons, readable, verified

SHOWN: dict[Outcome, int] = {"fixed": 6, "broken": 3, "still holds": 3, "still fails": 3}
"""How many pairs of each outcome a report shows."""

MEANINGS: dict[Outcome, str] = {
    "fixed": "wrong before, right now",
    "broken": "right before, wrong now",
    "still holds": "right before and now",
    "still fails": "wrong before and now",
}


def result_sections(
    before: Judged, after: Judged, *, seed: int = 0
) -> tuple[NumbersSection, PairsSection, TableSection]:
    """What became better and what worse: large numbers, images side by side, the table by kind.

    Args:
        after: Of the aligned one, on the same prompts with the same sampling.
    """
    before, after = verified(before), verified(after)
    table = comparisons(before, after, seed=seed)
    return _numbers(table), _pairs(before, after, seed), _by_kind(table)


def summary(before: ShapesEvaluation, after: ShapesEvaluation, *, seed: int = 0) -> str:
    """The result in two or three sentences, which say no more than the intervals allow."""
    table = comparisons(before, after, seed=seed)
    subjects = ["the share of images that show what was asked for", *["it"] * (len(table) - 1)]
    sentences = (_sentence(domain, rows[0], it) for (domain, rows), it in zip(table.items(), subjects, strict=True))
    return " ".join(sentences)


def _sentence(domain: str, row: PairedComparison, subject: str) -> str:
    shares = f"from {_percent(row.before.value)} to {_percent(row.after.value)}"
    if row.gain.is_above_zero:
        change = f"rose {shares}"
    elif row.gain.is_below_zero:
        change = f"fell {shares}"
    else:
        change = f"did not change significantly ({shares})"
    return f"On {readable(domain)} prompts, {subject} {change}."


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def _numbers(table: Mapping[str, list[PairedComparison]]) -> NumbersSection:
    rows = tuple(_named(rows[0], f"{readable(domain).capitalize()} prompts") for domain, rows in table.items())
    note = (
        "The share of images that show exactly what their prompt asks for, judged by the verifier of the shapes "
        "world, which reads every object out of the pixels. No prompt here was used in fine-tuning. In-domain "
        "compositions occur in the base model's own training, out-of-domain ones never do."
    )
    return NumbersSection("The result", rows, note=note)


def _by_kind(table: Mapping[str, list[PairedComparison]]) -> TableSection:
    groups = tuple(TableGroup(readable(domain).capitalize(), tuple(rows[1:])) for domain, rows in table.items())
    note = (
        "The gain of one kind rests on fewer images than that of all together, so its interval is wider. Intervals "
        "count prompts, not images: two images of one prompt are not two independent observations."
    )
    return TableSection("By kind of prompt", groups, note=note)


def _named(row: PairedComparison, name: str) -> PairedComparison:
    return PairedComparison(name, row.num_images, row.num_prompts, row.before, row.after, row.gain, row.outcomes)


def _pairs(before: ShapesEvaluation, after: ShapesEvaluation, seed: int) -> PairsSection:
    check_comparable(before, after)
    found = outcomes(before.holds, after.holds)
    drawn = draw_examples(found, counts=SHOWN, seed=seed)
    groups = tuple(
        PairGroup(
            outcome, found.count(outcome), tuple(_pair(before, after, i) for i in drawn[outcome]), MEANINGS[outcome]
        )
        for outcome in OUTCOMES
    )
    domains = " and ".join(readable(domain) for domain in dict.fromkeys(before.domains))
    selection = (
        "Every image was drawn twice from the same prompt and the same noise, by the base and by the aligned model. "
        f"Shown are up to {SHOWN['fixed']} fixed ones and up to {SHOWN['broken']} of every other outcome, drawn at "
        f"random (seed {seed}) from all {len(found)} images, {domains}; nobody picked them."
    )
    return PairsSection("Before and after", groups, selection)


def _pair(before: ShapesEvaluation, after: ShapesEvaluation, index: int) -> ImagePair:
    sides = [
        JudgedImage(one.images[index], one.verdicts[index].holds, one.verdicts[index].reason) for one in (before, after)
    ]
    return ImagePair(before.prompts[index].text, *sides, label=readable(before.domains[index]))
