"""The report of a run of `rpo align`: what was gained, the pairs, how training went, how to use the LoRA."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rpo.config.load import to_yaml
from rpo.curation.curate_config import DecideConfig
from rpo.curation.records import History, Instructions, histories, image_of
from rpo.curation.status import RunStatus, status_of
from rpo.curation.store.run import CurationRun
from rpo.evaluation.held_out import Judged
from rpo.reports.facts import environment_facts, settings_facts
from rpo.reports.html import Report, write_report
from rpo.reports.sections import (
    CurvesSection,
    FactsSection,
    ImagePair,
    JudgedImage,
    PairGroup,
    PairsSection,
    StagesSection,
    TextSection,
)
from rpo.reports.training import commands_section, curves_section, guide_section, result_sections, watched_section
from rpo.runs.align_config import AlignConfig
from rpo.training.log import read_metrics

SHOWN = 9
"""Edits that are shown."""


@dataclass(frozen=True)
class AlignFindings:
    """Everything that a finished run knows."""

    config: AlignConfig
    last: Path
    """Folder of the last round."""
    lora: Path
    preparation: Sequence[str]
    """Lines of Python after which the base loads it."""
    rounds: Sequence[Mapping[str, Any]]
    figure: str
    """The rounds as an SVG."""
    base: Judged
    aligned: Judged
    seconds: Mapping[str, float]


def write_align_report(findings: AlignFindings, path: Path) -> Path:
    """Write the report."""
    config, curated = findings.config, findings.last / "curate"
    results = result_sections(findings.base, findings.aligned)
    entries = read_metrics(findings.last / "dpo")
    facts = (*settings_facts(to_yaml(config)), ("Environment", environment_facts()))
    sections = (
        *results,
        edits_section(curated, seed=config.seed),
        yield_section(status_of(curated), findings.rounds[-1], config.curate.decide),
        curves_section(entries),
        *_watched(findings.rounds),
        guide_section(entries, is_judged=True),
        commands_section(findings.lora, config.curate.source.model.source, findings.preparation),
        StagesSection("Where the time went", tuple(findings.seconds.items())),
        FactsSection("Settings and environment", facts),
    )
    told = findings.aligned.gain_in_words(findings.base).partition("\n")[2].replace("\n", "; ")
    title = f"Rich Preference Optimization, {len(findings.rounds) - 1} round(s)"
    return write_report(Report(title, f"Mean score on held-out prompts: {told}.", sections, subtitle="rpo align"), path)


def _watched(rounds: Sequence[Mapping[str, Any]]) -> tuple[CurvesSection, ...]:
    """What was watched after each round, the base as round 0."""
    entries = [{"update": one["round"], **one["watched"]} for one in rounds]
    alarms = [f"round {one['round']}: {words}" for one in rounds for words in one["alarms"]]
    return watched_section(entries, alarms, unit="round")


def in_words(rules: DecideConfig) -> str:
    """Which images became a pair, in a sentence or two."""
    judges = [f"{name} by {margin:g} or more" if margin else name for name, margin in rules.rewards.items()]
    said = " and ".join(judges) if rules.agreement else f"{judges[0]} (of {' and '.join(judges)})"
    least = "".join(f", and {name} gave the better one at least {mark:g}" for name, mark in rules.min_chosen.items())
    across = " The model's own images of a prompt were paired in the same way, the best with the worst."
    return (
        f"An edit and its source became a pair where {said} told them apart{least} (policy {rules.policy})."
        f"{across if rules.orderings == 'prompt' else ''}"
    )


def yield_section(status: RunStatus, last: Mapping[str, Any], rules: DecideConfig) -> TextSection:
    """How the pairs of the last round came about, in numbers."""
    counts = {stage.name: stage.kept for stage in status.stages}
    end = f" Training was stopped: {last['stopped_because']}." if last["stopped_because"] else ""
    dropped = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in sorted(status.dropped.items()))
    return TextSection(
        "What it was trained on",
        (
            f"{last['trained_on']} preference pairs, {last['updates']} updates. In the last round the model drew "
            f"{counts['sources']} images of the training prompts. A critic said what was wrong with each, an "
            f"instructor what an editor should do about it, and the editor made {counts['edits']} edits. "
            f"{in_words(rules)}{end}",
            f"Dropped: {dropped}. Every image with its critique, instruction, scores and decision is in pairs.html of "
            "the round's curation.",
        ),
    )


def edits_section(run: Path, *, seed: int) -> PairsSection:
    """Some of the kept pairs: the model's image, and what the editor made of it."""
    found = CurationRun(run)
    kept = [place for place, one in enumerate(histories(found)) if (own := one.own_outcome) is not None and own.chosen]
    drawn = {kept[index] for index in np.random.default_rng(seed).permutation(len(kept))[:SHOWN]}
    pairs = tuple(_pair(found, one) for place, one in enumerate(histories(found)) if place in drawn)
    selection = f"Drawn at random (seed {seed}) from the {len(kept)} kept edits; below each is what was asked for."
    group = PairGroup("fixed", len(kept), pairs, "found better")
    return PairsSection("Images and their edits", (group,), selection, before="source", after="edit")


def _pair(run: CurationRun, one: History) -> ImagePair:
    images = [np.asarray(image_of(run, one, kind)) for kind in ("source", "edit")]
    told = one.instructions.text if isinstance(one.instructions, Instructions) else ""
    return ImagePair(one.source.caption, *(JudgedImage(pixels) for pixels in images), label=told)
