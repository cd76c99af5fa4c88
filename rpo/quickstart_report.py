"""The quickstart's report: what was gained, how training went, images before and after, and how to use the LoRA."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from rpo.model_card import CardFacts, Sample, write_model_card
from rpo.report import Report, write_report
from rpo.report_dpo import READING_GUIDE, curves_section
from rpo.report_facts import environment_facts, settings_facts
from rpo.sections import Command, CommandsSection, FactsSection, StagesSection, TextSection
from rpo.shapes.evaluation import ShapesEvaluation, comparisons, readable
from rpo.shapes.report import result_sections, summary
from rpo.trainers.dpo_config import DPOConfig
from rpo.training.log import read_metrics
from rpo.training.loop import TrainResult

SAMPLES = 4
"""Images in the model card."""


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
    numbers, images, kinds = result_sections(findings.base, findings.aligned, seed=findings.seed)
    sections = (
        numbers,
        images,
        kinds,
        curves_section(
            read_metrics(findings.trained.folder),
            error_ratio_limit=dpo.max_chosen_error_ratio,
            is_plain=not dpo.objective.changed,
        ),
        _about_the_pairs(findings),
        READING_GUIDE,
        _commands(findings),
        StagesSection("Where the time went", tuple(findings.seconds.items())),
        FactsSection(
            "Settings and environment", (*settings_facts(findings.settings), ("Environment", environment_facts()))
        ),
    )
    result = summary(findings.base, findings.aligned, seed=findings.seed)
    return write_report(Report("Diffusion-DPO on shapes", result, sections, subtitle="rpo quickstart"), path)


def write_quickstart_card(findings: Findings, dpo: DPOConfig) -> Path:
    """Put what was measured into the LoRA's model card.

    Args:
        findings: Of a finished quickstart.
        dpo: Settings of the training.
    """
    before, after = findings.base, findings.aligned
    table = comparisons(before, after, seed=findings.seed)
    shown = [int(index) for index in np.flatnonzero(~before.holds & after.holds)[:SAMPLES]]
    repeat = f"rpo shapes evaluate --lora FOLDER --images {len(before.where('in_domain'))} --seed {findings.seed}"
    card = CardFacts(
        method="Diffusion-DPO",
        base_expression="rpo.shapes.path()",
        imports=("import rpo.shapes",),
        title="Diffusion-DPO on shapes",
        description="Aligns the embedded checkpoint of rpo with its prompts: a demonstration, for no other images.",
        data=f"{findings.num_pairs} preference pairs of the base's own images, ordered by the shapes verifier.",
        settings=asdict(dpo),
        call={"num_inference_steps": before.sampling.num_steps, "guidance_scale": before.sampling.guidance_scale},
        results={readable(domain).capitalize(): tuple(rows) for domain, rows in table.items()},
        results_note="Share of images in which the verifier reads what the prompt asks for; base and LoRA start from "
        f"the same noise. `{repeat}` measures it again.",
        samples=tuple(Sample(before.texts[index], after.images[index]) for index in shown),
        samples_note=f"The first {len(shown)} evaluated images that were wrong before and are right now.",
        license="apache-2.0",
    )
    return write_model_card(findings.lora, card)


def _about_the_pairs(findings: Findings) -> TextSection:
    trained = findings.trained
    end = f" Training was stopped: {trained.stopped_because}." if trained.stopped_because else ""
    return TextSection(
        "What it was trained on",
        (
            f"{findings.num_pairs} preference pairs, {trained.updates} updates. Each pair is two images of one "
            "training prompt that the base model drew, ordered by the same verifier that gives the result above: it "
            f"stands in for a critic, and no prompt of the result was among them.{end}",
        ),
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
            Command(
                "Do the same with your own checkpoint and pairs:",
                "rpo train dpo configs/dpo_sd15.yaml data.source=PAIRS",
            ),
        ),
    )
