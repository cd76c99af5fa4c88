"""The quickstart's report: what was gained, how training went, images before and after, and how to use the LoRA."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from rpo.curation.curate_config import DecideConfig
from rpo.curation.status import status_of
from rpo.publishing.model_card import CardFacts, Sample, write_model_card
from rpo.reports.dpo import READING_GUIDE, curves_section
from rpo.reports.facts import environment_facts, settings_facts
from rpo.reports.html import Report, write_report
from rpo.reports.sections import Command, CommandsSection, FactsSection, StagesSection
from rpo.runs.quickstart_curation import edits_section, in_words, yield_section
from rpo.shapes.evaluation import ShapesEvaluation, comparisons, readable
from rpo.shapes.report import result_sections, summary
from rpo.trainers.dpo_config import DPOConfig
from rpo.training.log import read_metrics
from rpo.training.loop import TrainResult

TITLE = "Rich Preference Optimization on shapes"
SAMPLES = 4
"""Images in the model card."""


@dataclass(frozen=True)
class Findings:
    """Everything that a finished quickstart knows."""

    base: ShapesEvaluation
    aligned: ShapesEvaluation
    trained: TrainResult
    curated: Path
    """Folder of the curation."""
    rules: DecideConfig
    """What became a pair."""
    lora: Path
    seconds: Mapping[str, float]
    settings: str
    seed: int


def write_quickstart_report(findings: Findings, path: Path, dpo: DPOConfig) -> Path:
    """Write the report."""
    numbers, images, kinds = result_sections(findings.base, findings.aligned, seed=findings.seed)
    status = status_of(findings.curated)
    sections = (
        numbers,
        images,
        kinds,
        edits_section(findings.curated, seed=findings.seed),
        yield_section(status, findings.trained, findings.rules),
        curves_section(
            read_metrics(findings.trained.folder),
            error_ratio_limit=dpo.max_chosen_error_ratio,
            is_plain=not dpo.objective.changed,
        ),
        READING_GUIDE,
        _commands(findings),
        StagesSection("Where the time went", tuple(findings.seconds.items())),
        FactsSection(
            "Settings and environment", (*settings_facts(findings.settings), ("Environment", environment_facts()))
        ),
    )
    result = summary(findings.base, findings.aligned, seed=findings.seed)
    return write_report(Report(TITLE, result, sections, subtitle="rpo quickstart"), path)


def write_quickstart_card(findings: Findings, dpo: DPOConfig) -> Path:
    """Put what was measured into the LoRA's model card."""
    before, after = findings.base, findings.aligned
    table = comparisons(before, after, seed=findings.seed)
    shown = [int(index) for index in np.flatnonzero(~before.holds & after.holds)[:SAMPLES]]
    repeat = f"rpo shapes evaluate --lora FOLDER --images {len(before.where('in_domain'))} --seed {findings.seed}"
    card = CardFacts(
        method="Rich Preference Optimization",
        base_expression="rpo.shapes.path()",
        imports=("import rpo.shapes",),
        title=TITLE,
        description="Aligns the embedded checkpoint of rpo with its prompts: a demonstration, for no other images.",
        data=f"{status_of(findings.curated).num_pairs} pairs of the base's own images and of edits of them: the shapes "
        f"critic said what was wrong, an instructor what to do, the shapes editor did it. {in_words(findings.rules)}",
        settings=asdict(dpo),
        call={
            "num_inference_steps": before.sampling.num_steps,
            "eta": before.sampling.eta,
            "guidance_scale": before.sampling.guidance_scale,
        },
        results={readable(domain).capitalize(): tuple(rows) for domain, rows in table.items()},
        results_note="Share of images in which the verifier reads what the prompt asks for; base and LoRA start from "
        f"the same noise. `{repeat}` measures it again.",
        samples=tuple(Sample(before.texts[index], after.images[index]) for index in shown),
        samples_note=f"The first {len(shown)} evaluated images that were wrong before and are right now.",
        license="apache-2.0",
    )
    return write_model_card(findings.lora, card)


def _commands(findings: Findings) -> CommandsSection:
    load = (
        "import rpo.shapes\nfrom diffusers import AutoPipelineForText2Image\n\n"
        "pipe = AutoPipelineForText2Image.from_pretrained(rpo.shapes.path())\n"
        f'pipe.load_lora_weights("{findings.lora}")\n'
        'call = {"num_inference_steps": 20, "eta": 1.0, "guidance_scale": 2.0}\n'
        'image = pipe("a red circle above a blue square", **call).images[0]'
    )
    return CommandsSection(
        "Use the LoRA",
        (
            Command("With stock diffusers:", load),
            Command("Measure it again:", f"rpo shapes evaluate --lora {findings.lora}"),
            Command(
                "Do the same with your own checkpoint: make pairs, then train on them:",
                "rpo curate configs/curate_sd15.yaml --output runs/curate && rpo curate export runs/curate\n"
                "rpo train dpo configs/dpo_sd15.yaml data.source=runs/curate/export/native dpo.sft_weight=0.1",
            ),
        ),
    )
