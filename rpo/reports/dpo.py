"""The report's sections about a Diffusion-DPO run: its curves, and how to read them."""

import math
from collections.abc import Iterable, Mapping

from rpo.reports.charts import Chart, Mark, Series, curve
from rpo.reports.sections import CurvesSection, TextSection

READING_GUIDE = TextSection(
    "What the numbers mean",
    (
        "A preference pair says: of these two images for one prompt, this one is better. Diffusion-DPO trains the "
        "model to remove noise from the better image relatively more precisely than from the worse one, compared with "
        "the model that it started from. Whether it learnt what the pairs mean, and not the pairs by heart, shows on "
        "prompts that it was not trained on, which is what the result above measures.",
    ),
    (
        (
            "loss 0.69 → 0.65",
            "Normal. The loss starts at log 2 = 0.693, where the model cannot tell the two images apart, and hardly "
            "falls, because one noisy step says little about a whole image. A loss far below is no success: it means "
            "that the model has moved far from where it started.",
        ),
        (
            "implicit accuracy",
            "The share of pairs in which the model has moved towards the better image more than towards the worse "
            "one. 50 % is chance; a run that learns stays above it.",
        ),
        (
            "margin",
            "By how much, on average, in the units of the loss. It should rise slowly.",
        ),
        (
            "error ratio",
            "How well the model still removes noise, by how well the base does. For the better images it should stay "
            "near 1; when it climbs, the model forgets how to draw, whatever the other curves say, and training stops "
            "at the limit. For the worse images it may rise.",
        ),
        (
            "95 % interval",
            "Had other prompts of the same kind been drawn, the result would mostly lie in this range. If the range "
            "of a gain does not contain 0, the gain is hardly luck.",
        ),
        (
            "same seeds",
            "Both models start from the same noise for every image, so a difference comes from the training and not "
            "from the draw.",
        ),
    ),
)


def curves_section(
    entries: Iterable[Mapping[str, float | None]], *, error_ratio_limit: float, is_plain: bool = True
) -> CurvesSection:
    """The curves of a run's `metrics.jsonl`; a chart of which nothing was logged is left out.

    Args:
        error_ratio_limit: Of the chosen images, where training stops; infinite if it does not.
        is_plain: Whether the objective is Diffusion-DPO itself, whose loss starts at log 2.
    """
    lines = list(entries)
    limits = (Mark("limit", error_ratio_limit),) if math.isfinite(error_ratio_limit) else ()
    charts = (
        Chart(
            "Loss",
            _curves(lines, {"dpo/loss": "loss"}) or _curves(lines, {"loop/loss": "loss"}),
            (Mark("log 2", math.log(2)),) if is_plain else (),
            "The preference loss. It starts at log 2 = 0.693 and falls only a little."
            if is_plain
            else "The preference loss of the objective that was chosen.",
        ),
        Chart(
            "Implicit accuracy",
            _curves(lines, {"dpo/implicit_accuracy": "pairs"}),
            (Mark("chance", 0.5),),
            "Share of pairs in which the better image gained on the worse one.",
        ),
        Chart(
            "Margin",
            _curves(lines, {"dpo/margin": "margin"}),
            (Mark("start", 0.0),),
            "How far the better images are ahead, in the units of the loss.",
        ),
        Chart(
            "Denoising error against the base",
            _curves(lines, {"dpo/chosen_error_ratio": "better", "dpo/rejected_error_ratio": "worse"}),
            (Mark("base", 1.0), *limits),
            "The better images should stay near 1. Training stops when they pass the limit."
            if limits
            else "The better images should stay near 1.",
        ),
    )
    return CurvesSection(
        "How training went",
        tuple(chart for chart in charts if chart.series),
        "Faint: single updates, or blocks of them in long runs. Solid: running mean.",
    )


def _curves(lines: Iterable[Mapping[str, float | None]], names: Mapping[str, str]) -> tuple[Series, ...]:
    found = [curve(lines, metric, name=name) for metric, name in names.items()]
    return tuple(series for series in found if series.x)
