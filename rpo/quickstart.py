"""The whole way on one machine: find where a model fails, say why, mend the images, align the model, prove it, show it.

Images of the training prompts are drawn from the embedded model; a critic says what is wrong with each, an instructor
what an editor should do about it, an editor does it, and a reward keeps what got better: `rpo.curation`. Diffusion-DPO
trains a LoRA on the pairs of image and edit; base and LoRA are compared on prompts that were not trained on, with the
same noise; the LoRA is saved, verified and described in a report.

Every stage leaves its result in the run's folder, so that a killed run continues with `resume`.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from rpo.config import to_yaml
from rpo.curation.component_config import EditorConfig
from rpo.curation.curate import curate
from rpo.curation.curate_config import CurateConfig, DecideConfig
from rpo.curation.export import export
from rpo.curation.page import write_page
from rpo.curation.status import RunStatus, status_of
from rpo.data.jsonl import append_line, mend_last_line, read_lines
from rpo.data.preference import PairSet
from rpo.data.readers import read_pairs
from rpo.evaluate import Comparison
from rpo.interrupts import ended_in_order
from rpo.models.config import ModelConfig, load_model
from rpo.quickstart_report import Findings, write_quickstart_card, write_quickstart_report
from rpo.ranges import Count, Seed, Text
from rpo.run_lock import sole_owner
from rpo.run_settings import keep_settings, require_same_settings
from rpo.settings import settings
from rpo.shapes.evaluate import Measurement, evaluate, format_accuracies, held_out_prompts
from rpo.shapes.evaluation import Sampling, comparisons
from rpo.shapes.prompts import sample_prompts
from rpo.text import write_text
from rpo.trainers.dpo import DPOTrainer
from rpo.trainers.dpo_config import DPOConfig
from rpo.training.loop import LoopConfig, TrainResult


@settings
class QuickstartConfig:
    """Settings of the quickstart; the defaults take about nine minutes on two CPU cores."""

    output: Text = "runs/quickstart"
    """The run's folder: pairs, metrics, LoRA, report."""

    seed: Seed = 0
    """Of prompts, noise and training; the same seed gives the same numbers."""

    prompts: Count = 690
    """Training prompts to draw images of; 100 to 690. More give more pairs."""

    images_per_prompt: Count = 8
    """Images drawn of each training prompt; 1 to 8. 4 saves three minutes and gains less."""

    curate: CurateConfig = field(
        default_factory=lambda: CurateConfig(
            editor=EditorConfig(batch_size=64),
            decide=DecideConfig(
                rewards={"critic": 1.0, "shapes-clip": 0.0}, min_chosen={"critic": 10.0}, orderings="prompt"
            ),
            evaluation="",  # the critic sees with the verifier's eyes, and both rewards filter
        )
    )
    """How images become pairs; its output, prompts and seed are those of the run."""

    evaluation_prompts: Count = 320
    """Held-out prompts of each domain, one image each by base and by LoRA. More narrow the intervals."""

    batch_size: Count = 64
    """Images drawn at once."""

    device: Text = "auto"
    """"auto" takes the GPU when there is one."""

    dpo: DPOConfig = field(
        default_factory=lambda: DPOConfig(
            beta=150.0,
            sft_weight=0.05,
            rank=16,
            pairs_per_update=32,
            micro_batch=32,
            caption_dropout=0.1,
            max_chosen_error_ratio=2.0,
            loop=LoopConfig(
                updates=450,
                learning_rate=1e-3,
                lr_schedule="cosine",
                warmup_updates=10,
                ema_decay=0.97,
                checkpoint_every=90,
            ),
        )
    )
    """Of the training; its folder and seed are those of the run."""


@dataclass(frozen=True)
class QuickstartResult:
    """What a quickstart found."""

    measured: Measurement
    trained: TrainResult
    num_pairs: int
    report: Path
    lora: Path


def run(config: QuickstartConfig, *, resume: bool = False) -> QuickstartResult:
    """Go the whole way, with progress on the terminal.

    Args:
        config: The settings.
        resume: Continue a killed run in the same folder.

    Raises:
        ValueError: If the folder holds a run and `resume` was not asked for, or that run had other settings.
    """
    folder = Path(config.output)
    is_main = os.environ.get("RANK", "0") == "0"
    with sole_owner(folder, is_main=is_main), ended_in_order():
        require_same_settings(folder, config, resume=resume, free=_FREE)
        keep_settings(folder, config)
        return _whole_way(folder, config, resume=resume)


_FREE = ("output", "curate.progress", "dpo.loop.progress")
"""Settings that may change in a resumed run."""


def _whole_way(folder: Path, config: QuickstartConfig, *, resume: bool) -> QuickstartResult:
    stages = Stages(folder / "stages.jsonl")
    model = load_model(ModelConfig(device=config.device))
    held_out = held_out_prompts(config.evaluation_prompts, config.seed)
    sampling = Sampling(config.seed)

    with stages.timed("evaluate the base model"):
        base = evaluate(model, held_out, sampling, batch_size=config.batch_size, progress="base model")
    tqdm.write(format_accuracies(Measurement(base)) + "\n")
    with stages.timed("draw, criticise, instruct, edit, judge"):
        curated, pairs = make_pairs(folder, config)
    status = status_of(curated)
    tqdm.write(f"{status}\n  to leaf through: {curated / 'pairs.html'}\n")

    dpo = replace(config.dpo, folder=str(folder / "dpo"), seed=config.seed)
    trainer = DPOTrainer(model, pairs, dpo)
    with stages.timed("train the LoRA"):
        trained = trainer.train(resume=resume)
    with stages.timed("save and verify the LoRA"):
        lora = trainer.save(folder / "lora")
    with stages.timed("evaluate the aligned model"):
        aligned = evaluate(model, held_out, sampling, batch_size=config.batch_size, progress="aligned model")

    measured = Measurement(base, aligned)
    tqdm.write("\n" + format_accuracies(measured, seed=config.seed))
    _write_results(folder / "results.json", measured, trained, status, config.seed)
    rules, settings = config.curate.decide, to_yaml(config)
    findings = Findings(base, aligned, trained, curated, rules, lora, stages.seconds, settings, config.seed)
    report = write_quickstart_report(findings, folder / "report.html", dpo)
    write_quickstart_card(findings, dpo)
    tqdm.write(f"\nLoRA:   {lora}\nreport: {report}  (open it in a browser)")
    return QuickstartResult(measured, trained, len(pairs), report, lora)


def make_pairs(folder: Path, config: QuickstartConfig) -> tuple[Path, PairSet]:
    """Curate images of the training prompts; what is there already is not done again.

    Args:
        folder: Of the run.
        config: How many, from which seed.

    Returns:
        The folder of the curation, and its pairs.

    Raises:
        ValueError: If no edit got better.
    """
    texts = folder / "prompts.txt"
    write_text(texts, "".join(f"{one.text}\n" for one in sample_prompts("train", config.prompts, config.seed)))
    source = replace(
        config.curate.source,
        prompts=str(texts),
        images_per_prompt=config.images_per_prompt,
        seed=config.seed + 1_000_003,  # other noise than that of any evaluation
        batch_size=config.batch_size,
        model=replace(config.curate.source.model, device=config.device),
    )
    place = folder / "curate"
    editor = replace(config.curate.editor, device=config.device)
    settings = replace(config.curate, output=str(place), source=source, editor=editor)
    run = curate(settings, resume=place.exists())
    write_page(run)
    return run, read_pairs(export(run, "native", to=folder / "pairs").path)


class Stages:
    """Seconds of each stage, kept over restarts: a stage done twice is counted twice, as it was waited for twice."""

    def __init__(self, file: Path):
        """Read what earlier sessions of the run took, if `file` is there."""
        self._file = file
        self.seconds: dict[str, float] = {}
        mend_last_line(file)
        for entry in read_lines(file):
            self._add(str(entry["stage"]), float(str(entry["seconds"])))

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count what happens inside as `stage`."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._add(stage, seconds)
        append_line(self._file, {"stage": stage, "seconds": round(seconds, 3)})

    def _add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


def _write_results(file: Path, measured: Measurement, trained: TrainResult, curated: RunStatus, seed: int) -> None:
    assert measured.aligned is not None
    table = comparisons(measured.base, measured.aligned, seed=seed)
    accuracy: dict[str, Any] = {domain: {row.name: _row(row) for row in rows} for domain, rows in table.items()}
    results = {
        "yield": {stage.name: stage.kept for stage in curated.stages},
        "dropped": dict(curated.dropped),
        "pairs": curated.num_pairs,
        "updates": trained.updates,
        "stopped_because": trained.stopped_because,
        "accuracy": accuracy,
    }
    write_text(file, json.dumps(results, indent=2) + "\n")


def _row(row: Comparison) -> dict[str, Any]:
    parts = (("base", row.before), ("aligned", row.after), ("gain", row.gain))
    numbers = {name: [round(one, 5) for one in (part.value, part.low, part.high)] for name, part in parts}
    return {"images": row.num_images, **numbers}
