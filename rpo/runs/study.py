"""`rpo study`: which algorithm, with which reward, and how do they scale? A grid of runs of equal cost, judged alike.

    settings.yaml          what was asked for; another study is refused here
    prompts-COUNT.jsonl    what is trained on, by share
    base/result.json       the checkpoint's scores, and those of the images that rewards choose among
    cells/NAME/            a run of `rpo align`, or runs of `rpo train`, one for each round
    cells/NAME/result.json the scores of what came of it, with what it cost
    study.json             all that follows from them
    report.html            the same for a person; the first table is there before anything is trained

A cell that has a result is never run again; one that was killed goes on where it was, on the CPU to the bit. Any number
of processes, of machines that share the folder, work on one study: each takes the next cell that nobody holds.
"""

import gc
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from rpo.adapters.loading import load_model
from rpo.data.prompts import metadata_of, read_prompts
from rpo.errors import InputError
from rpo.files.lock import LOCK, taken_if_free
from rpo.files.text import read_text
from rpo.files.whole import write_whole
from rpo.models.checkpoint import Checkpoint, refuse_editor
from rpo.models.unloaded import unloaded_pipeline
from rpo.runs.align import align
from rpo.runs.plan import Plan, plan
from rpo.runs.settings import keep_settings, require_same_settings
from rpo.runs.study_cells import (
    ONLINE,
    WATCHED,
    Prices,
    StudyCell,
    cells_of,
    fields_of,
    folder_of,
    prompts_file,
)
from rpo.runs.study_config import StudyConfig
from rpo.runs.study_findings import StudyFindings
from rpo.runs.study_judge import IN_DOMAIN, Base, Jury, judge_base, told, untold
from rpo.runs.study_report import PAGE, answers, first_table, write_study
from rpo.runs.train import run
from rpo.runs.train_config import DPORunConfig
from rpo.trainers.identity import base_identity
from rpo.training.made_with import keep_made_with, made_with

RESULT = "result.json"
BASE = "base"
FREE = ("output", "seeds", "progress")
"""Settings that may change in a resumed study."""

WAIT_SECONDS = 2.0
"""From one look for a free cell to the next, while others work on the rest."""


@dataclass(frozen=True)
class Job:
    """Something whose result is a file, and what makes it."""

    folder: Path
    make: Callable[[], dict[str, Any]]

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to do."""
        return (self.folder / RESULT).is_file()


@dataclass(frozen=True)
class Study:
    """A study that can be run: its cells, who judges them, and what is trained on."""

    config: StudyConfig
    jury: Jury
    prompts: Sequence[str]
    cells: Sequence[StudyCell]
    flops: float | None
    """Of one evaluation, where they were counted."""

    @property
    def folder(self) -> Path:
        """Its own."""
        return Path(self.config.output)


def planned(config: StudyConfig) -> Study:
    """Work out all cells; refuses what cannot be run, before any weight is read."""
    jury = Jury(config)
    prompts = read_prompts(config.prompts, seed=0)[: config.prompt_count]
    jury.refuse_trained(list(prompts))
    prices, flops = _prices(config)
    return Study(config, jury, prompts, cells_of(config, prices, len(prompts)), flops)


def plan_in_words(study: Study) -> str:
    """What a study comes to, in a table."""
    config, cells = study.config, study.cells
    wide = max(len(cell.name) for cell in cells)
    lines = [f"{'cell':{wide}}  {'prompts':>7}  {'rounds × updates':>16}  {'evaluations':>12}"]
    for cell in cells:
        if cell.place.seed == config.seeds[0]:
            length = f"{cell.place.rounds} × {cell.updates:,}"
            lines.append(f"{cell.name:{wide}}  {cell.prompts:>7,}  {length:>16}  {cell.planned:>12,.0f}")
    done = sum(Job(folder_of(config, cell.place), dict).is_done for cell in cells)
    trained = sum(cell.planned for cell in cells)
    held_out = config.held_out
    drawn = sum(len(one.prompts) for one in study.jury.sets.values()) * held_out.images_per_prompt
    of_base = max(0, config.best_of - held_out.images_per_prompt) * len(study.jury.sets["out_of_domain"].prompts)
    lines += [
        "",
        f"{len(cells)} cells ({len(cells) // len(config.seeds)} of each of {len(config.seeds)} seeds), {done} finished",
        f"training   {trained:,.0f} evaluations (one image through the denoiser, forward){_flops(study, trained)}",
        f"judging    {drawn:,} images of each of {len(cells) + 1} models, and {of_base:,} more of the base",
    ]
    return "\n".join(lines)


def study(
    config: StudyConfig, *, resume: bool = False, number: int = 0, say: Callable[[str], None] = lambda words: None
) -> Path:
    """Run what is not finished of a study, and report.

    Args:
        resume: Go on with a study of the same folder.
        number: Of this process among those that were started together; the first one waits for all and reports.
        say: Told the plan, the first table and what came of it.

    Returns:
        The page.

    Raises:
        InputError: Something of it cannot be; or cells failed, which are named when the rest is finished.
    """
    found, folder = planned(config), Path(config.output)
    require_same_settings(folder, config, resume=resume or number > 0, free=FREE)
    folder.mkdir(parents=True, exist_ok=True)
    keep_settings(folder, config)
    shows = config.progress and number == 0
    base = Job(folder / BASE, lambda: _of_base(found, progress=shows))
    if base.is_done and number == 0:
        _require_same_inputs(found, json.loads(read_text(base.folder / RESULT))["inputs"])
    _keep_prompts(found)
    say(plan_in_words(found))
    if failed := _work([base], waits=True):
        raise InputError(failed[BASE])
    known = json.loads(read_text(base.folder / RESULT))
    jobs = [Job(folder_of(config, cell.place), partial(_of_cell, found, cell)) for cell in found.cells]
    findings = StudyFindings(config, _base(found, known), found.jury.sets, _results(jobs))
    if number == 0:
        keep_made_with(folder, made_with(type(config).__name__, known["inputs"]))
        write_study(findings, folder)  # before anything is trained
        say(first_table(findings))
    failed = _work(jobs, waits=number == 0, bar=_bar(len(jobs)) if shows else None)
    if number > 0:
        return folder / PAGE
    findings = replace(findings, results=_results(jobs), failed=failed)
    page = write_study(findings, folder)
    say("\n".join(answers(findings)))
    if failed:
        named = (f"{name}: {words}" for name, words in failed.items())
        listed = "\n- ".join((f"cells that failed: {len(failed)}", *named))
        raise InputError(f"{listed}\n- the rest is in {page}; mend what they name, and run again with --resume")
    return page


def _work(jobs: Sequence[Job], *, waits: bool, bar: Any = None) -> dict[str, str]:
    """Do what nobody else does, until all is done or, without waiting, taken; gives what failed, by name."""
    failed, left = dict[str, str](), [job for job in jobs if not job.is_done]
    while left:
        took = False
        for job in left:
            with taken_if_free(job.folder / LOCK) as is_ours:
                if not is_ours or job.is_done:
                    continue
                took = True
                if bar is not None:
                    bar.set_description(job.folder.name)
                try:
                    write_whole(job.folder / RESULT, json.dumps(job.make(), indent=1, allow_nan=False) + "\n")
                except InputError as error:
                    failed[job.folder.name] = str(error)
            if bar is not None:
                bar.update(sum(one.is_done for one in jobs) - bar.n)
        left = [job for job in left if not job.is_done and job.folder.name not in failed]
        if left and not took:
            if not waits:
                break
            time.sleep(WAIT_SECONDS)
    if bar is not None:
        bar.close()
    return failed


def _results(jobs: Sequence[Job]) -> tuple[dict[str, Any], ...]:
    return tuple(json.loads(read_text(job.folder / RESULT)) for job in jobs if job.is_done)


def _bar(total: int) -> Any:
    return tqdm(total=total, unit="cell", dynamic_ncols=True)


def _of_base(found: Study, *, progress: bool) -> dict[str, Any]:
    model = _checkpoint(found)
    base = judge_base(found.jury, model, found.config, progress=progress)
    return {"inputs": _inputs(found, model), "candidates": told(base.candidates)}


def _checkpoint(found: Study) -> Checkpoint:
    model = load_model(found.config.model.deployed)
    refuse_editor(model, "`rpo study`")
    return model


def _base(found: Study, known: Mapping[str, Any]) -> Base:
    return Base(untold(known["candidates"]), found.config.held_out.images_per_prompt)


def _of_cell(found: Study, cell: StudyCell) -> dict[str, Any]:
    """Train a cell, as far as it is not trained, and judge what came of it."""
    facts, lora = (_online if cell.place.algorithm in ONLINE else _rounds)(found.config, cell)
    gc.collect()  # what training took
    model = load_model(replace(found.config.model.deployed, lora=str(lora)))
    scores = {name: found.jury.scores(model, name) for name in found.jury.sets}
    return {**asdict(cell.place), "name": cell.name, "planned": cell.planned, **facts, "scores": told(scores)}


def _rounds(config: StudyConfig, cell: StudyCell) -> tuple[dict[str, Any], Path]:
    (settings,) = cell.runs
    ended = align(settings, resume=Path(settings.output).exists())
    rounds = ended.rounds[1:]
    images, edits = (sum(one["yield"][name] for one in rounds) for name in ("sources", "edits"))
    updates = [one["updates"] for one in rounds]
    facts = {
        "spent": images * cell.image + edits * config.edit_cost + sum(updates) * cell.update,
        "prompts": cell.prompts,
        "updates": updates,
        "images": images,
        "edits": edits,
        "pairs": [one["yield"]["pairs"] for one in rounds],
        "stopped_because": [one["stopped_because"] for one in rounds],
    }
    return facts, ended.lora


def _online(config: StudyConfig, cell: StudyCell) -> tuple[dict[str, Any], Path]:
    ended = [run(one, resume=Path(one.output).exists()) for one in cell.runs]
    updates = [one.trained.updates for one in ended]
    facts = {
        "spent": sum(updates) * cell.update,
        "prompts": cell.prompts,
        "updates": updates,
        "stopped_because": [one.trained.stopped_because for one in ended],
    }
    return facts, ended[-1].saved


def _prices(config: StudyConfig) -> tuple[Prices, float | None]:
    """What the work of the checkpoint costs; networks are counted once for each kind of adapter."""
    model = config.model
    sections: dict[str, Any] = {
        "dpo": DPORunConfig(**fields_of(config.dpo), model=model),
        **{name: cls(**fields_of(getattr(config, name)), model=model) for name, cls in ONLINE.items()},
    }
    if config.backward is not None:
        _, family = unloaded_pipeline(model.source, dtype=getattr(torch, model.dtype), revision=model.revision)
        return Prices(dict.fromkeys(sections, config.backward), family.guidance == "cfg"), None
    used = {"dpo" if name == "rich" else name for name in config.algorithms}
    counted: dict[str, Plan] = {}
    backward: dict[str, float] = {}
    for name in sections:
        if name in used:
            key = repr((sections[name].adapter, getattr(sections[name], "resolution", None)))
            counted[key] = counted.get(key) or plan(sections[name])
            backward[name] = counted[key].backward
    first = next(iter(counted.values()))
    return Prices(backward, first.guided), float(first.forward.flops)


def _keep_prompts(found: Study) -> None:
    """Write what is trained on, and what rounds are judged by on their way."""
    counts = {len(found.prompts), *(max(1, round(share * len(found.prompts))) for share in found.config.shares)}
    texts = {prompts_file(found.config, count): found.prompts[:count] for count in counts}
    texts[found.folder / WATCHED] = list(dict.fromkeys(found.jury.sets[IN_DOMAIN].prompts))
    for file, prompts in texts.items():
        rows = [{"prompt": str(prompt), **metadata_of(prompt)} for prompt in prompts]
        write_whole(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _inputs(found: Study, model: Checkpoint) -> dict[str, str]:
    """What all cells have in common beside their settings."""
    texts = {"prompts": found.prompts, **{name: one.prompts for name, one in found.jury.sets.items()}}
    return base_identity(model) | {
        name: hashlib.sha256(repr(list(one)).encode()).hexdigest()[:16] for name, one in texts.items()
    }


def _require_same_inputs(found: Study, before: Mapping[str, str]) -> None:
    now = _inputs(found, _checkpoint(found))
    if changed := [f"{name} from {was} to {now.get(name)}" for name, was in before.items() if was != now.get(name)]:
        raise InputError(
            f"{found.folder} was started with something else: {'; '.join(changed)}; expected the same, for cells to be "
            "comparable; restore it, or give --output for another folder"
        )


def _flops(found: Study, evaluations: float) -> str:
    return "" if found.flops is None else f", {evaluations * found.flops / 1e15:,.3g} PFLOP and as much as rewards cost"
