"""The report of an online run: reward, what it cost in KL, how well the value foresaw it, and images first and last.

On `shapes` base and aligned model are compared by the verifier on prompts that were not trained on, as in the
quickstart.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from rpo.reports.charts import Chart, Mark, Series, curve, running_mean
from rpo.reports.facts import environment_facts, settings_facts
from rpo.reports.html import Report, write_report
from rpo.reports.sections import (
    Command,
    CommandsSection,
    CurvesSection,
    FactsSection,
    PreviewRow,
    PreviewsSection,
    Section,
    StagesSection,
    TextSection,
    typographic,
)
from rpo.shapes.evaluation import ShapesEvaluation
from rpo.shapes.report import result_sections, summary
from rpo.training.log import read_metrics

Entries = Sequence[Mapping[str, float | None]]

VALUE_BINS = {
    "value/explained_variance_1": "data end",
    "value/explained_variance_2": "2nd quarter",
    "value/explained_variance_3": "3rd quarter",
    "value/explained_variance_4": "noise end",
}
"""The parts of the process in which the value's quality is logged."""

PATH_SMOOTHING = 6
"""The running mean of reward against KL covers one part in this many of the run."""

LEAST = -1.0
"""Where explained variance is cut in the drawing: a value that knows nothing yet can be far below."""

STRIP_WIDTH = 1024
"""Pixels of a preview row, beyond which it is made smaller, so that a report stays small."""

ENDS = 10
"""The reward at the start and at the end of a run is the mean of one part in this many of its updates."""

READING_GUIDE = TextSection(
    "What the numbers mean",
    (
        "An online trainer draws images with the model as it is, asks what they are worth, and makes likelier what "
        "earned more. What is gained in reward is paid for in distance from the model that it started from: a model "
        "that has gone far may please the reward and nobody else. Look at the images, not at the reward alone.",
    ),
    (
        (
            "reward",
            "Weighted sum of all rewards, mean over the images of an update's rollout, with the noise that it is "
            "trained with. It should rise; from update to update it swings with the prompts that are drawn.",
        ),
        (
            "KL",
            "How far the paths of the images have moved from those of the base model, in nats per image. 0 at the "
            "start. The better of two runs is the one with more reward at the same KL.",
        ),
        (
            "explained variance",
            "How much of the differences in what came of a moment the value foresaw: 1 is all, 0 is no more than a "
            "constant would, below 0 is worse than that. It is measured before the value is fitted to a rollout. Next "
            "to the noise little can be foreseen, next to the data nearly everything.",
        ),
        (
            "spread",
            "Standard deviation of the rewards in a rollout. When it goes to 0 there is nothing left to learn from, "
            "or all images have become the same.",
        ),
        (
            "95 % interval",
            "Had other prompts of the same kind been drawn, the result would mostly lie in this range. If the range "
            "of a gain does not contain 0, the gain is hardly luck.",
        ),
    ),
)


@dataclass(frozen=True)
class OnlineFindings:
    """Everything that a finished online run knows."""

    method: str
    folder: Path
    """With `metrics.jsonl`."""
    previews: Path
    """Image grids, one row per prompt, named by update."""
    preview_columns: int
    saved: Path
    base_expression: str
    """Python that names the checkpoint trained on."""
    updates: int
    stopped_because: str | None
    rewards: Mapping[str, float]
    """Weights by name."""
    prompts: Sequence[str]
    """Of which the first different ones are those of the grids, row by row."""
    base: ShapesEvaluation | None
    aligned: ShapesEvaluation | None
    settings: str
    seconds: Mapping[str, float]
    seed: int


def write_online_report(findings: OnlineFindings, path: Path) -> Path:
    """Write the report."""
    entries = read_metrics(findings.folder)
    results: list[Section] = []
    if findings.base is not None and findings.aligned is not None:
        results += result_sections(findings.base, findings.aligned, seed=findings.seed)
    sections = (
        *results[:1],
        curves_section(entries, rewards=tuple(findings.rewards)),
        *previews_section(findings.previews, findings.prompts, columns=findings.preview_columns),
        *results[1:],
        READING_GUIDE,
        _commands(findings),
        StagesSection("Where the time went", tuple(findings.seconds.items())),
        FactsSection(
            "Settings and environment", (*settings_facts(findings.settings), ("Environment", environment_facts()))
        ),
    )
    title = findings.method[:1].upper() + findings.method[1:]
    return write_report(Report(title, _summary(findings, entries), sections, subtitle="rpo train"), path)


def curves_section(entries: Entries, *, rewards: Sequence[str] = ()) -> CurvesSection:
    """The curves of a run's `metrics.jsonl`; a chart of which nothing was logged is left out.

    Args:
        rewards: Names of the rewards; each gets a chart of its own where there are several.
    """
    reward = curve(entries, "reward/mean", name="reward")
    several = rewards if len(rewards) > 1 else ()
    charts = (
        Chart(
            "Reward",
            _present(reward),
            (Mark("start", reward.y[0]),) if reward.y else (),
            "Mean over the images of each update's rollout.",
        ),
        Chart(
            "Reward against KL",
            _present(_path(entries, "policy/kl", "reward/mean", name="the run")),
            (),
            "Up is more reward, right is further from the base model; the run starts at the left.",
            x_label="KL from the base, nats per image",
        ),
        *(
            Chart(
                f"Reward: {name}",
                _present(curve(entries, f"reward/{name}", name=name)),
                (),
                "Its own score, before it is weighted.",
            )
            for name in several
        ),
        Chart(
            "KL from the base",
            _present(curve(entries, "policy/kl", name="KL")),
            (),
            "Nats per image, along the whole path.",
        ),
        Chart(
            "Quality of the value",
            tuple(_cut(s) for metric, name in VALUE_BINS.items() for s in _present(curve(entries, metric, name=name))),
            (Mark("constant", 0.0),),
            typographic(f"Share of the variance of the returns that it foresaw, by time; drawn from {LEAST:g} up."),
        ),
        Chart(
            "Spread of rewards",
            _present(curve(entries, "reward/std", name="spread")),
            (),
            "Standard deviation in each rollout.",
        ),
    )
    return CurvesSection(
        "How training went",
        tuple(chart for chart in charts if chart.series),
        "Faint: single updates, or blocks of them in long runs. Solid: running mean.",
    )


def previews_section(folder: Path, prompts: Iterable[str], *, columns: int) -> tuple[PreviewsSection, ...]:
    """The first and the last grid of a run, row by row; nothing if there are fewer than two."""
    grids = sorted(folder.glob("update-*.png"))
    if grids[1:] == []:
        return ()
    first, last = (np.asarray(Image.open(grid).convert("RGB")) for grid in (grids[0], grids[-1]))
    side = first.shape[1] // columns
    pairs = zip(dict.fromkeys(prompts), _strips(first, side), _strips(last, side), strict=False)
    before, after = (f"update {int(grid.stem.partition('-')[2])}" for grid in (grids[0], grids[-1]))
    return (
        PreviewsSection(
            "Images on the way",
            tuple(PreviewRow(*pair) for pair in pairs),
            before,
            after,
            "Training prompts, drawn from the same noise at both times, without further noise on the way. The grids "
            f"between are in the folder {folder.name} of the run.",
        ),
    )


def _strips(grid: np.ndarray, side: int) -> list[np.ndarray]:
    """The rows of a grid, each small enough for a report."""
    strips = [Image.fromarray(row) for row in np.split(grid, grid.shape[0] // side)]
    for strip in strips:
        strip.thumbnail((STRIP_WIDTH, STRIP_WIDTH))
    return [np.asarray(strip) for strip in strips]


def _path(entries: Entries, x: str, y: str, *, name: str) -> Series:
    """One metric against another over the run, both smoothed alike, and more than curves over updates are."""
    points = curve([entry for entry in entries if x in entry], y, name=name, x=x)
    window = max(1, len(points.x) // PATH_SMOOTHING)
    across, up = (tuple(running_mean(np.array(values), window).tolist()) for values in (points.x, points.y))
    return Series(name, across, up, is_noisy=False) if points.x else points


def _present(series: Series) -> tuple[Series, ...]:
    return (series,) if series.x else ()


def _cut(series: Series) -> Series:
    """The curve without what lies below LEAST, which would flatten the rest."""
    return replace(series, y=tuple(max(LEAST, value) for value in series.y))


def _summary(findings: OnlineFindings, entries: Entries) -> str:
    sentences = []
    if findings.base is not None and findings.aligned is not None:
        sentences.append(summary(findings.base, findings.aligned, seed=findings.seed))
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


def _commands(findings: OnlineFindings) -> CommandsSection:
    start = "from diffusers import AutoPipelineForText2Image\n\npipe = AutoPipelineForText2Image.from_pretrained("
    if findings.saved.name != "lora":
        load = f'{start}"{findings.saved}")'
        return CommandsSection("Use the result", (Command("With stock diffusers:", load),))
    load = f'{start}{findings.base_expression})\npipe.load_lora_weights("{findings.saved}")'
    if findings.base is None:
        return CommandsSection("Use the LoRA", (Command("With stock diffusers:", load),))
    again = f"rpo shapes evaluate --lora {findings.saved}"
    return CommandsSection(
        "Use the LoRA", (Command("With stock diffusers:", "import rpo.shapes\n" + load), Command("Measure it:", again))
    )
