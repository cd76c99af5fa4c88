"""The quickstart's report: what was gained, how training went, images before and after, and how to use the LoRA."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from rpo.evaluate import Comparison, draw_examples, format_gain, outcomes
from rpo.report import Report, write_report
from rpo.report_dpo import READING_GUIDE, curves_section
from rpo.sections import (
    Command,
    CommandsSection,
    FactsSection,
    ImagePair,
    JudgedImage,
    NumbersSection,
    PairGroup,
    PairsSection,
    Section,
    StagesSection,
    TableGroup,
    TableSection,
)
from rpo.shapes.evaluation import ShapesEvaluation, comparisons, readable
from rpo.trainers.dpo import DPOConfig
from rpo.training.log import read_metrics
from rpo.training.loop import TrainResult

SHOWN = {"fixed": 12, "broken": 6, "still holds": 6, "still fails": 6}
"""Images shown of each outcome; drawn at random by the seed."""

MEANINGS = {
    "fixed": "The base failed the prompt, the aligned model does not.",
    "broken": "The base had it right, the aligned model does not.",
    "still holds": "Right before and after.",
    "still fails": "Wrong before and after.",
}

LIBRARIES = ("rpo", "torch", "diffusers", "transformers", "peft", "accelerate")


@dataclass(frozen=True)
class Findings:
    """Everything that a finished quickstart knows."""

    base: ShapesEvaluation
    aligned: ShapesEvaluation
    trained: TrainResult
    num_pairs: int
    lora: Path
    seconds: Mapping[str, float]
    settings: str
    seed: int


def write_quickstart_report(findings: Findings, path: Path, dpo: DPOConfig) -> Path:
    """Write the report.

    Args:
        findings: Of a finished quickstart.
        path: The `.html` file.
        dpo: Settings of the training.
    """
    table = comparisons(findings.base, findings.aligned, seed=findings.seed)
    totals = {domain: rows[0] for domain, rows in table.items()}
    sections: tuple[Section, ...] = (
        NumbersSection(
            "Verified accuracy on prompts that were not trained on",
            tuple(_named(row, readable(domain).capitalize()) for domain, row in totals.items()),
            note="An image counts if the verifier reads exactly the scene that its prompt asks for. In-domain: combinations of "
            "colours and shapes that the base was trained on. Out-of-domain: combinations it never saw.",
        ),
        _images(findings),
        TableSection(
            "By kind of prompt",
            tuple(TableGroup(readable(domain).capitalize(), tuple(rows)) for domain, rows in table.items()),
            note="Bars are 95 % intervals over prompts; gains compare the same prompts and the same noise.",
        ),
        curves_section(read_metrics(findings.trained.folder), error_ratio_limit=dpo.max_chosen_error_ratio),
        READING_GUIDE,
        _commands(findings),
        StagesSection("Where the time went", tuple(findings.seconds.items())),
        FactsSection("Settings and environment", (("Settings", _settings(findings.settings)), ("Environment", _environment()))),
    )
    gain = totals["in_domain"].gain
    summary = (
        f"{format_gain(gain)} in-domain after {findings.trained.updates} updates on {findings.num_pairs} preference pairs"
        + (f"; training was stopped: {findings.trained.stopped_because}" if findings.trained.stopped_because else ".")
    )
    return write_report(Report("Diffusion-DPO on shapes", summary, sections, subtitle="rpo quickstart"), path)


def _named(row: Comparison, name: str) -> Comparison:
    return Comparison(name, row.num_images, row.num_prompts, row.before, row.after, row.gain, row.outcomes)


def _images(findings: Findings) -> PairsSection:
    before, after = findings.base, findings.aligned
    found = outcomes(before.holds, after.holds)
    drawn = draw_examples(found, counts=SHOWN, seed=findings.seed)

    def pair(index: int) -> ImagePair:
        judged = (
            JudgedImage(one.images[index], one.verdicts[index].holds, one.verdicts[index].reason) for one in (before, after)
        )
        return ImagePair(before.prompts[index].text, *judged, label=readable(before.domains[index]))

    groups = tuple(
        PairGroup(outcome, found.count(outcome), tuple(pair(index) for index in indices), MEANINGS[outcome])
        for outcome, indices in drawn.items()
    )
    return PairsSection(
        "Before and after, from the same noise",
        groups,
        selection=f"Drawn at random from all {len(found)} evaluated images, by the run's seed; nobody picked them.",
    )


def _commands(findings: Findings) -> CommandsSection:
    load = (
        "import rpo.shapes\nfrom diffusers import StableDiffusionPipeline\n\n"
        "pipe = StableDiffusionPipeline.from_pretrained(rpo.shapes.path())\n"
        f'pipe.load_lora_weights("{findings.lora}")\n'
        'image = pipe("a red circle above a blue square", num_inference_steps=20, guidance_scale=3.0).images[0]'
    )
    return CommandsSection(
        "Use the LoRA",
        (
            Command("With stock diffusers:", load),
            Command("Measure it again:", f"rpo shapes evaluate --lora {findings.lora}"),
            Command("Do the same with your own checkpoint and pairs:", "rpo train dpo configs/dpo_sd15.yaml data.source=PAIRS"),
        ),
    )


def _settings(text: str) -> tuple[tuple[str, str], ...]:
    lines = [line for line in text.splitlines() if ":" in line]
    return tuple((name.rstrip(), value.strip()) for name, value in (line.split(":", 1) for line in lines) if value.strip())


def _environment() -> tuple[tuple[str, str], ...]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    libraries = tuple((name, version(name)) for name in LIBRARIES)
    return (("device", device), ("python", platform.python_version()), *libraries)
