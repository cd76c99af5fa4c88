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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from rpo.config import to_yaml
from rpo.curation.curate import curate
from rpo.curation.export import export
from rpo.curation.page import write_page
from rpo.curation.status import RunStatus, status_of
from rpo.data.preference import PairSet
from rpo.data.readers import read_pairs
from rpo.errors import InputError
from rpo.evaluation.comparison import Comparison
from rpo.files import append_line, mend_last_line, read_lines, written_whole
from rpo.interrupts import ended_in_order
from rpo.models.config import ModelConfig, load_model
from rpo.run_lock import sole_owner
from rpo.runs.quickstart_config import QuickstartConfig
from rpo.runs.quickstart_report import Findings, write_quickstart_card, write_quickstart_report
from rpo.runs.settings import keep_settings, require_same_settings
from rpo.shapes.evaluate import Measurement, evaluate, format_accuracies, held_out_prompts
from rpo.shapes.evaluation import Sampling, ShapesEvaluation, comparisons, judge_images
from rpo.shapes.prompts import sample_prompts
from rpo.text import write_text
from rpo.trainers.dpo import DPOTrainer
from rpo.training.loop import TrainResult


@dataclass(frozen=True)
class QuickstartResult:
    """What a quickstart found."""

    measured: Measurement
    trained: TrainResult
    num_pairs: int
    report: Path
    lora: Path


def run(config: QuickstartConfig, *, resume: bool = False) -> QuickstartResult:
    """Go the whole way, with progress on the terminal."""
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
        base = _evaluated_once(
            folder / "base.npy",
            lambda: evaluate(model, held_out, sampling, batch_size=config.batch_size, progress="base model"),
            lambda images: judge_images(images, held_out, sampling),
        )
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


def _evaluated_once(
    file: Path, draw: Callable[[], ShapesEvaluation], judge: Callable[[np.ndarray], ShapesEvaluation]
) -> ShapesEvaluation:
    """What was drawn before is judged again, and not drawn again."""
    if file.exists():
        try:
            return judge(np.load(file, allow_pickle=False))
        except (ValueError, EOFError) as error:
            raise InputError(f"{file} is damaged ({error}); expected images of the base; delete it") from error
    found = draw()
    with written_whole(file) as partial, partial.open("wb") as stream:
        np.save(stream, found.images)
    return found


def make_pairs(folder: Path, config: QuickstartConfig) -> tuple[Path, PairSet]:
    """Curate images of the training prompts; what is there already is not done again."""
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
