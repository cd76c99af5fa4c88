"""Rich Preference Optimization from end to end, in rounds: draw, criticise, instruct, edit, keep what improved, train.

    π₀ = the checkpoint        pairs of round k: images of π_{k-1} and edits of them        π_k = DPO(π_{k-1}, pairs)

Every round starts from the model of the last one, which is also its reference, with a new adapter: the loss begins at
log 2 each time, and the pull to the reference is to the policy that drew the images. What is written is one LoRA of the
checkpoint, the adapters of all rounds beside each other (`rpo.adapters.stack`), and what is judged is that file.

A round that is finished is a line of `rounds.jsonl`; a killed run goes on inside the round it was in, and does at most
one shard of its records again. The paper (arXiv:2503.11720) has one round; iterating it is ours. `rpo quickstart` is
one round on the embedded checkpoint, by `configs/quickstart.yaml`.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from rpo.adapters.loading import load_model
from rpo.curation.card import shown_model
from rpo.curation.curate import Components, check_settings, curate
from rpo.curation.export import export
from rpo.curation.page import write_page
from rpo.curation.score import check_filters, is_verifier
from rpo.curation.sources import plan_import
from rpo.curation.status import RunStatus, status_of
from rpo.curation.store.run import CurationRun
from rpo.data.preference import PairSet, pair_set, pairs_identity
from rpo.data.prompts import read_prompts
from rpo.data.readers import read_pairs
from rpo.errors import InputError
from rpo.evaluation.held_out import HeldOut, Judged
from rpo.files.lock import sole_owner
from rpo.files.text import write_text
from rpo.files.whole import append_line, mend_last_line, read_lines
from rpo.interrupts import ended_in_order
from rpo.models.checkpoint import Checkpoint, refuse_editor
from rpo.models.config import ModelConfig
from rpo.models.packaged import expression_of, imports_of
from rpo.models.usual import call_of
from rpo.publishing.measured import measured
from rpo.publishing.model_card import CardFacts, write_model_card
from rpo.reports.rounds import draw_rounds, format_rounds
from rpo.runs.align_config import AlignConfig
from rpo.runs.align_report import AlignFindings, write_align_report
from rpo.runs.align_watch import RoundWatch
from rpo.runs.settings import keep_settings, require_same_settings
from rpo.trainers.dpo import DPO
from rpo.trainers.identity import base_identity, lora_preparation
from rpo.trainers.trainer import Trainer
from rpo.training.made_with import MadeWith, keep_made_with, made_with
from rpo.training.resume import versions

ROUNDS, STAGES = "rounds.jsonl", "stages.jsonl"

WATCHED = ("monitor.held_out", "monitor.alarm", "monitor.stop")
FREE = ("output", "rounds", "curate.progress", "curate.engine", "curate.workers", "dpo.learning.progress", *WATCHED)
"""Settings that may change in a resumed run."""


@dataclass(frozen=True)
class AlignResult:
    """What a run came to."""

    folder: Path
    lora: Path
    """Of the last round, for the checkpoint itself."""
    report: Path
    rounds: tuple[Mapping[str, Any], ...]
    """The lines of `rounds.jsonl`: the base as round 0, then each round with its yield, its training and its scores."""


def align(
    config: AlignConfig,
    *,
    resume: bool = False,
    components: Components | None = None,
    tell: Callable[[MadeWith], None] = lambda now: None,
) -> AlignResult:
    """Run all rounds.

    Args:
        resume: Continue a killed run in the same folder.
        components: What critic, editor and the others are instead of those that the settings name.
        tell: Called with what the run is made with, before anything is drawn.

    Example:
        >>> align(AlignConfig(output="runs/align", rounds=2)).lora       # doctest: +SKIP
        PosixPath('runs/align/lora')
    """
    held_out, watch = _checked(config)
    with sole_owner(Path(config.output)), ended_in_order():
        require_same_settings(Path(config.output), config, resume=resume, free=FREE)
        return _Rounds(config, held_out, watch, components).run(tell)


def _checked(config: AlignConfig) -> tuple[HeldOut, RoundWatch]:
    """Refuse what cannot be met before anything is spent."""
    check_settings(config.curate)
    if not is_verifier(config.held_out.reward):  # which is the truth, and cannot be taken in
        check_filters(config.curate.decide, config.held_out.reward, config.curate.critic.kind)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            f"{os.environ['WORLD_SIZE']} processes were started, but rounds go on one; start one, or run `rpo curate` "
            "and `rpo train dpo` on several, one after the other"
        )
    trained, device = config.curate.decide.rewards, config.curate.source.model.device
    watch = RoundWatch(config.monitor, config.held_out, trained=trained, device=device)
    held_out = HeldOut(replace(config.held_out, seed=config.held_out.seed + config.seed))
    source = config.curate.source
    if source.kind == "generate":
        held_out.refuse_trained(read_prompts(source.prompts, seed=source.seed + config.seed))
    else:
        held_out.refuse_trained([item.caption for item in plan_import(source).items])
    return held_out, watch


class _Rounds:
    """The rounds of one run, and what is kept of them in its folder."""

    def __init__(self, config: AlignConfig, held_out: HeldOut, watch: RoundWatch, components: Components | None):
        """Read what is there already."""
        self.config, self.held_out, self.watch, self.components = config, held_out, watch, components
        self.folder, self.shows = Path(config.output), config.curate.progress
        mend_last_line(self.folder / STAGES)
        self.seconds: dict[str, float] = {}
        for entry in read_lines(self.folder / STAGES):
            self._took(str(entry["stage"]), float(str(entry["seconds"])))

    def run(self, tell: Callable[[MadeWith], None]) -> AlignResult:
        """All that are not finished, the LoRA of the last, and the report."""
        inputs, preparation = self._start()
        _require_same_inputs(self.folder, inputs)
        tell(now := made_with(type(self.config).__name__, inputs))
        keep_settings(self.folder, self.config)
        keep_made_with(self.folder, now)
        done = list(read_lines(self.folder / ROUNDS))
        if not done:
            base = self._judged(0)
            watched = self.watch.after(base, base)
            done.append(self._note({"round": 0, "inputs": inputs, "scores": base.means, **watched}))
        for number in range(len(done), self.config.rounds + 1):
            if self.config.monitor.stop and done[-1].get("alarms"):
                tqdm.write(f"no round {number}: the monitor raised an alarm after the last one")
                break
            done.append(self._note(self._round(number)))
            if self.shows:
                tqdm.write(format_rounds(done))
        last = len(done) - 1
        lora, figure = self.folder / "lora", draw_rounds(done)
        shutil.copytree(self._place(last) / "lora", lora, dirs_exist_ok=True)
        write_text(self.folder / "rounds.svg", figure)
        findings = AlignFindings(
            self.config,
            self._place(last),
            lora,
            preparation,
            done,
            figure,
            self._judged(0),
            self._judged(last),
            self.seconds,
        )
        report = write_align_report(findings, self.folder / "report.html")
        return AlignResult(self.folder, lora, report, tuple(done))

    def _round(self, number: int) -> dict[str, Any]:
        """One round, from the LoRA of the last one to its own."""
        place = self._place(number)
        with self._timed("draw, criticise, instruct, edit, judge"):
            curated, page = self._curated(number)
        if self.shows:
            tqdm.write(f"{status_of(curated)}\n  to leaf through: {page}\n")
        pairs = self._pooled(number)
        model = load_model(self._after(number - 1), mixed_precision=self.config.dpo.learning.mixed_precision)
        seed = self.config.dpo.seed + self.config.seed + number - 1
        trainer = Trainer(model, DPO(pairs, replace(self.config.dpo, output=str(place / "dpo"), seed=seed)))
        with self._timed("train the LoRA"):
            trained = trainer.train(resume=trainer.folder.exists())
        trainer.save(place / "lora")
        card = self._card(number, pairs, model)
        write_model_card(place / "lora", card)
        base, judged = self._judged(0), self._judged(number)
        watched = self.watch.after(base, judged)
        for alarm in watched["alarms"]:
            tqdm.write(f"ALARM  round {number}: {alarm}; look at the images")
        write_model_card(place / "lora", measured(card, base, judged, self.config.held_out.reward))
        gains = judged.gains_over(base)
        return {
            "round": number,
            "yield": _yield(status_of(curated)),
            "trained_on": len(pairs),
            "updates": trained.updates,
            "stopped_because": trained.stopped_because,
            "scores": judged.means,
            "gain": {domain: asdict(gain) for domain, gain in gains.items()},
            **watched,
        }

    def _curated(self, number: int) -> tuple[str, str]:
        """The curation of a round, of images by the LoRA of the last one, from noise of its own; and its page."""
        settings, place = self.config.curate, self._place(number)
        seed = settings.source.seed + self.config.seed + number - 1
        source = replace(settings.source, model=self._after(number - 1), seed=seed)
        settings = replace(settings, output=str(place / "curate"), source=source)
        run = curate(settings, resume=(place / "curate").exists(), components=self.components)
        export(run, "native", to=place / "pairs")
        return run, write_page(run)

    def _after(self, number: int) -> ModelConfig:
        """The model after a round, 0 being the start."""
        start = self.config.curate.source.model
        return replace(start, lora=str(self._place(number) / "lora")) if number else start

    def _pooled(self, number: int) -> PairSet:
        """The pairs of this round and, if wanted, of those before it, the newest first."""
        numbers = range(number, 0, -1) if self.config.keep_earlier_pairs else [number]
        pairs = [pair for one in numbers for pair in read_pairs(self._place(one) / "pairs")]
        return pair_set(pairs[: self.config.max_pairs], origin=f"the pairs of round {number}")

    def _judged(self, number: int) -> Judged:
        """The scores of a round's LoRA on the held-out prompts, of the start for 0; drawn once, and kept."""
        file = self.folder / f"judged-{number}.npz"
        if file.exists():
            return self.held_out.read(file)
        model = load_model(self._after(number).deployed)
        with self._timed("judge"):
            judged = self.held_out.judge(model, progress=(f"round {number}" if number else "base") * self.shows or None)
        judged.write(file)
        return judged

    def _licence_of_edits(self, number: int) -> str:
        """Of the editor whose images were trained on, if it is known."""
        edits = CurationRun(self._place(number) / "curate").identity_of("edits")
        if not (licence := edits.get("licence")):
            return ""
        return f"Trained on images by the editor `{shown_model(edits.get('model', ''))}`, whose licence is: {licence}."

    def _card(self, number: int, pairs: PairSet, model: Checkpoint) -> CardFacts:
        source = self.config.curate.source
        base = source.model.source
        packaged = expression_of(base)
        return CardFacts(
            method="Rich Preference Optimization",
            base_model=None if packaged else base,
            base_expression=packaged,
            imports=imports_of(base),
            preparation=lora_preparation(model),
            data=f"{len(pairs)} pairs of the model's own images and edits of them, made in {number} round(s) of "
            "critique, instruction and edit, kept where "
            f"{' and '.join(self.config.curate.decide.rewards)} found them better.",
            license_notes=self._licence_of_edits(number),
            identity=pairs_identity(pairs),
            settings=asdict(self.config.dpo),
            versions=versions(),
            call=call_of(model, num_steps=source.num_steps, guidance_scale=source.guidance_scale, eta=source.eta),
        )

    def _start(self) -> tuple[dict[str, str], tuple[str, ...]]:
        """What all rounds of a run must have in common beside its settings, and how its base is made to load a LoRA."""
        texts: dict[str, Any] = {"held-out prompts": self.held_out.prompts}
        source = self.config.curate.source
        if source.kind == "generate":
            texts["prompts"] = read_prompts(source.prompts, seed=source.seed + self.config.seed)
        else:
            texts["images"] = [item.id for item in plan_import(source).items]
        told = {name: hashlib.sha256(repr(found).encode()).hexdigest()[:16] for name, found in texts.items()}
        refuse_editor(model := load_model(source.model), "what is drawn in rounds")
        return base_identity(model) | told, lora_preparation(model)

    def _place(self, number: int) -> Path:
        return self.folder / f"round-{number}"

    def _note(self, entry: dict[str, Any]) -> dict[str, Any]:
        append_line(self.folder / ROUNDS, entry)
        return entry

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """Count what happens inside; a stage done twice is counted twice, as it was waited for twice."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._took(stage, seconds)
        append_line(self.folder / STAGES, {"stage": stage, "seconds": round(seconds, 3)})

    def _took(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


def _yield(status: RunStatus) -> dict[str, Any]:
    found: dict[str, Any] = {stage.name: stage.kept for stage in status.stages if stage.name != "decisions"}
    found |= {"pairs": status.num_pairs, "dropped": dict(status.dropped)}
    if (one := status.evaluation) is not None:
        found["evaluation"] = {"better": one.better, "equal": one.equal, "worse": one.worse, "mean_gap": one.mean_gap}
    return found


def _require_same_inputs(folder: Path, inputs: Mapping[str, str]) -> None:
    for begun in islice(read_lines(folder / ROUNDS), 1):
        before: Any = begun.get("inputs", {})
        if changed := [
            f"{name} from {was} to {inputs.get(name)}" for name, was in before.items() if was != inputs.get(name)
        ]:
            raise InputError(
                f"{folder} was started with something else: {'; '.join(changed)}; restore it, or give --output for "
                "another folder"
            )
