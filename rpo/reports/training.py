"""The report of a training run, by whatever algorithm: the result, curves, images on the way, and how to use it.

Every chart has its metrics; those of which nothing was logged are left out, and so is what the guide says of them.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from rpo.evaluation.comparison import PairedComparison, mean_comparison
from rpo.evaluation.held_out import Judged
from rpo.files.text import read_text
from rpo.models.packaged import expression_of, imports_of
from rpo.plugins import load_plugin
from rpo.reports.charts import Chart, Mark, Series, curve, running_mean
from rpo.reports.facts import environment_facts, settings_facts
from rpo.reports.html import Report, guide, write_report
from rpo.reports.sections import (
    CommandsSection,
    CurvesSection,
    FactsSection,
    NumbersSection,
    PreviewRow,
    PreviewsSection,
    Scale,
    Section,
    Snippet,
    StagesSection,
    TextSection,
    typographic,
)
from rpo.training.log import ALARMS, HELD_OUT, METRICS, read_metrics

Entries = Sequence[Mapping[str, float | None]]

RESULTS = {"shapes": "rpo.shapes.report:result_sections"}
"""By the name of held-out prompts: what tells more of two evaluations than their means; (before, after) → sections."""

LEAST = -1.0
"""Where explained variance is cut in the drawing: a value that knows nothing yet can be far below."""

PATH_SMOOTHING = 6
"""The running mean of reward against KL covers one part in this many of the run."""

STRIP_WIDTH = 1024
"""Pixels of a preview row, beyond which it is made smaller, so that a report stays small."""

SHARE = "/share"
"""How the metric ends that says what part a reward has in the advantage."""

NEAR = 0.02
"""How far from log 2 a first loss may be to be that of Diffusion-DPO."""

ENDS = 10
"""The reward at the start and at the end of a run is the mean of one part in this many of its updates."""


@dataclass(frozen=True)
class Findings:
    """Everything that a finished run knows."""

    method: str
    folder: Path
    """With `metrics.jsonl`."""
    previews: Path
    """Image grids, one row per prompt, named by update."""
    previewed: Sequence[str]
    """The prompt of each of their rows."""
    saved: Path
    base_source: str
    """What the checkpoint was loaded from."""
    preparation: Sequence[str]
    """Lines of Python after which it loads a LoRA, as `pipe`."""
    updates: int
    stopped_because: str | None
    base: Judged | None
    aligned: Judged | None
    settings: str
    seconds: Mapping[str, float]


def write_training_report(findings: Findings, path: Path) -> Path:
    """Write the report."""
    entries = read_metrics(findings.folder)
    results = result_sections(findings.base, findings.aligned)
    sections = (
        *results[:1],
        curves_section(entries),
        *watched_section(entries, read_alarms(findings.folder)),
        *previews_section(findings.previews, findings.previewed),
        *results[1:],
        guide_section(entries, is_judged=findings.aligned is not None),
        commands_section(findings.saved, findings.base_source, findings.preparation),
        StagesSection("Where the time went", tuple(findings.seconds.items())),
        FactsSection(
            "Settings and environment", (*settings_facts(findings.settings), ("Environment", environment_facts()))
        ),
    )
    return write_report(Report(findings.method, _summary(findings, entries), sections, subtitle="rpo train"), path)


def result_sections(base: Judged | None, aligned: Judged | None) -> list[Section]:
    """What was gained on held-out prompts; nothing if nobody judged."""
    if base is None or aligned is None:
        return []
    if aligned.told_by in RESULTS:
        return list(load_plugin(aligned.told_by, RESULTS, "report of results")(base, aligned))
    rows = tuple(
        mean_comparison(
            domain,
            base.by_domain[domain].tolist(),
            aligned.by_domain[domain].tolist(),
            groups=[base.texts[index] for index in base.where(domain)],
        )
        for domain in dict.fromkeys(base.domains)
    )
    return [NumbersSection("The result", rows, _scale_of(rows), note="Mean score on prompts that were not trained on.")]


def _scale_of(rows: Sequence[PairedComparison]) -> Scale:
    ends = [end for row in rows for side in (row.before, row.after) for end in (side.low, side.high)]
    return Scale(factor=1, unit="", gain_unit="", digits=3, low=min(ends), high=max(max(ends), min(ends) + 1e-6))


def curves_section(entries: Entries) -> CurvesSection:
    """The curves of a run's `metrics.jsonl`; a chart of which nothing was logged is left out."""
    logged = {name for entry in entries for name in entry}
    rewards = sorted(name for name in logged if name.startswith("reward/") and name not in METRICS)
    shares = {name: name[len("reward/") : -len(SHARE)] for name in rewards if name.endswith(SHARE)}
    rewards = [name for name in rewards if name not in shares]
    start = curve(entries, "reward/mean", name="reward").y[:1]
    is_dpo = any("dpo/margin" in entry for entry in entries)
    first = next((entry["dpo/loss"] for entry in entries if entry.get("dpo/loss") is not None), None)
    starts_there = first is not None and abs(first - np.log(2)) < NEAR
    log_two = (Mark("log 2", float(np.log(2))),) if starts_there else ()
    charts = [
        Chart("Loss", _curves(entries, {"dpo/loss": "loss"}), log_two, "The preference loss of the objective."),
        _chart(entries, "Implicit accuracy", {"dpo/implicit_accuracy": "pairs"}, "chance", 0.5),
        _chart(entries, "Margin", {"dpo/margin": "margin"}, "start", 0.0),
        _chart(
            entries,
            "Denoising error against the base",
            {"dpo/chosen_error_ratio": "better", "dpo/rejected_error_ratio": "worse"},
            "base",
            1.0,
        ),
        Chart("Reward", _curves(entries, {"reward/mean": "reward"}), tuple(Mark("start", one) for one in start), ""),
        Chart(
            "Reward against KL",
            _path(entries, "policy/kl", "reward/mean"),
            (),
            "Up is more reward, right is further from the base model; the run starts at the left.",
            x_label="KL from the base, nats per image",
        ),
        *(_chart(entries, f"Reward: {name.partition('/')[2]}", {name: "score"}) for name in rewards),
        _chart(entries, "KL from the base", {"policy/kl": "KL"}),
        Chart("Quality of the value", _value_curves(entries), (Mark("constant", 0.0),), ""),
        _chart(entries, "Share of the advantage", shares),
        _chart(entries, "Spread of rewards", {"reward/std": "spread"}),
    ]
    if any(entry.get("reward/failed") for entry in entries):
        charts.append(_chart(entries, "Images without a score", {"reward/failed": "share"}))
    if not is_dpo and not rewards and not start:
        charts.insert(0, _chart(entries, "Loss", {"loop/loss": "loss"}))
    note = "Faint: single updates, or blocks of them in long runs. Solid: running mean."
    return CurvesSection("How training went", tuple(chart for chart in charts if chart.series), note)


def watched_section(entries: Entries, alarms: Sequence[str], *, unit: str = "update") -> tuple[CurvesSection, ...]:
    """What was watched, as one figure; nothing if nobody looked, or once alone.

    Args:
        unit: What an entry is the end of, by which it is found.
    """
    seen = [entry for entry in entries if entry.get("watched/saturation") is not None]
    if len(seen) < 2:  # noqa: PLR2004 - one shows no change
        return ()
    held_out = [name for name in seen[0] if name.startswith(HELD_OUT)]
    shares = {
        "Diversity": {"watched/pixel_diversity": "pixels", "watched/diversity": "as a model sees it"},
        "Colours": {"watched/saturation": "saturation", "watched/colour_entropy": "entropy"},
        "Detail": {
            "watched/edge_density": "edges",
            "watched/sharpness": "sharpness",
            "watched/high_frequency": "high frequencies",
        },
    }
    charts = [
        _watched(seen, "Trained reward", {"watched/reward": "reward"}),
        *(_watched(seen, f"Not trained on: {name.removeprefix(HELD_OUT)}", {name: "score"}) for name in held_out),
        *(_watched(seen, title, names, by_start=True) for title, names in shares.items()),
    ]
    note = " ".join(
        [
            "The same prompts from the same noise, again and again.",
            *([f"Alarm at {alarm}." for alarm in alarms] or ["No alarm."]),
        ]
    )
    drawn = tuple(replace(chart, x_label=unit) for chart in charts if chart.series)
    return (CurvesSection("Is the reward gamed?", drawn, note),)


def read_alarms(folder: Path) -> list[str]:
    """What the monitor of a run has raised, in words."""
    file = folder / ALARMS
    return (
        [f"rollout {one['rollout']}: {one['words']}" for one in json.loads(read_text(file))] if file.is_file() else []
    )


def _watched(seen: Entries, title: str, names: Mapping[str, str], *, by_start: bool = False) -> Chart:
    """Curves that are exact at their points; by the value at the start, they show what share of it is left."""
    curves = [replace(one, is_noisy=False) for one in _curves(seen, names)]
    if by_start:
        curves = [replace(one, y=tuple(y / one.y[0] for y in one.y)) for one in curves if one.y[0]]
        return Chart(f"{title}, by that of the start", tuple(curves), (Mark("start", 1.0),))
    return Chart(title, tuple(curves), tuple(Mark("start", one.y[0]) for one in curves))


def _chart(
    entries: Entries, title: str, names: Mapping[str, str], mark: str = "", at: float = 0.0, caption: str = ""
) -> Chart:
    return Chart(title, _curves(entries, names), (Mark(mark, at),) if mark else (), caption)


def _curves(entries: Iterable[Mapping[str, float | None]], names: Mapping[str, str]) -> tuple[Series, ...]:
    lines = list(entries)
    found = [curve(lines, metric, name=name) for metric, name in names.items()]
    return tuple(series for series in found if series.x)


def _value_curves(entries: Entries) -> tuple[Series, ...]:
    """Explained variance by time, without what lies below LEAST, which would flatten the rest."""
    names = ("data end", "2nd quarter", "3rd quarter", "noise end")
    found = _curves(entries, {f"value/explained_variance_{part}": name for part, name in enumerate(names, start=1)})
    return tuple(replace(one, y=tuple(max(LEAST, value) for value in one.y)) for one in found)


def _path(entries: Entries, x: str, y: str) -> tuple[Series, ...]:
    """One metric against another over the run, both smoothed alike, and more than curves over updates are."""
    points = curve([entry for entry in entries if x in entry], y, name="the run", x=x)
    if not points.x:
        return ()
    window = max(1, len(points.x) // PATH_SMOOTHING)
    across, up = (tuple(running_mean(np.array(values), window).tolist()) for values in (points.x, points.y))
    return (Series("the run", across, up, is_noisy=False),)


def guide_section(entries: Entries, *, is_judged: bool) -> TextSection:
    """What the numbers of this run mean."""
    logged = {name for entry in entries for name in entry} | ({"judged"} if is_judged else set())
    known = guide("training")
    terms = tuple((one["term"], one["text"]) for one in known if one["metric"] in logged and one["term"])
    paragraphs = tuple(one["text"] for one in known if one["metric"] in logged and not one["term"])
    return TextSection("What the numbers mean", paragraphs, terms)


def previews_section(folder: Path, prompts: Sequence[str]) -> tuple[PreviewsSection, ...]:
    """The first and the last grid of a run, a row for each prompt; nothing if there are fewer than two."""
    grids = sorted(folder.glob("update-*.png"))
    if len(grids) < 2:  # noqa: PLR2004 - one shows no change
        return ()
    pairs = zip(prompts, *(_strips(grid, len(prompts)) for grid in (grids[0], grids[-1])), strict=True)
    before, after = (f"update {int(grid.stem.partition('-')[2])}" for grid in (grids[0], grids[-1]))
    note = (
        "Training prompts, drawn from the same noise at both times, without further noise on the way. The grids "
        f"between are in the folder {folder.name} of the run."
    )
    return (PreviewsSection("Images on the way", tuple(PreviewRow(*pair) for pair in pairs), before, after, note),)


def _strips(grid: Path, rows: int) -> list[np.ndarray]:
    """The rows of a grid, each small enough for a report."""
    strips = [Image.fromarray(row) for row in np.split(np.asarray(Image.open(grid).convert("RGB")), rows)]
    for strip in strips:
        strip.thumbnail((STRIP_WIDTH, STRIP_WIDTH))
    return [np.asarray(strip) for strip in strips]


def commands_section(saved: Path, base_source: str, preparation: Sequence[str]) -> CommandsSection:
    """How to use what was trained."""
    start = "from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained("
    if saved.name != "lora":
        return CommandsSection("Use the result", (Snippet("With stock diffusers:", f'{start}"{saved}")'),))
    base = expression_of(base_source) or repr(base_source)
    load = [*imports_of(base_source), f"{start}{base})", *preparation, f'pipe.load_lora_weights("{saved}")']
    commands = [Snippet("With stock diffusers:", "\n".join(load))]
    if base_source == "shapes":
        commands.append(Snippet("Measure it:", f"rpo shapes evaluate --lora {saved}"))
    return CommandsSection("Use the LoRA", tuple(commands))


def _summary(findings: Findings, entries: Entries) -> str:
    sentences = []
    if findings.base is not None and findings.aligned is not None:
        gains = findings.aligned.gains_over(findings.base)
        told = ", ".join(
            f"{domain.replace('_', ' ')} {findings.base.means[domain]:.3g} → {findings.aligned.means[domain]:.3g}"
            + ("" if gain.is_above_zero or gain.is_below_zero else " (no significant change)")
            for domain, gain in gains.items()
        )
        sentences.append(f"Mean score on held-out prompts: {told}.")
    reward = curve(entries, "reward/mean", name="reward").y
    if reward:
        part = max(1, len(reward) // ENDS)
        start, end = np.mean(reward[:part]), np.mean(reward[-part:])
        sentences.append(
            typographic(f"In {findings.updates} updates the mean reward went from {start:.4g} to {end:.4g}.")
        )
    if findings.stopped_because:
        sentences.append(f"Training was stopped: {findings.stopped_because}.")
    return " ".join(sentences) or f"{findings.updates} updates."
