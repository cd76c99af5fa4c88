"""Rich Preference Optimization from end to end, in rounds: draw, criticise, instruct, edit, keep what improved, train.

    π₀ = the checkpoint        pairs of round k: images of π_{k-1} and edits of them        π_k = DPO(π_{k-1}, pairs)

Every round starts from the model of the last one, which is also its reference, with a new adapter: the loss begins at
log 2 each time, and the pull to the reference is to the policy that drew the images. What is written is one LoRA of the
checkpoint, the adapters of all rounds beside each other (`rpo.adapters.stack`), and what is judged is that file.

A round that is finished is a line of `rounds.jsonl`; a killed run goes on inside the round it was in. The paper
(arXiv:2503.11720) has one round; iterating it is ours.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from rpo.adapters.stack import stack_loras
from rpo.curation.curate import Components, check_settings, curate
from rpo.curation.export import export
from rpo.curation.score import check_filters, is_verifier
from rpo.curation.status import RunStatus, status_of
from rpo.data.preference import PairSet, pair_set
from rpo.data.prompts import read_prompts
from rpo.data.readers import read_pairs
from rpo.errors import InputError
from rpo.evaluation.held_out import HeldOut, HeldOutScores
from rpo.files import append_line, read_lines
from rpo.interrupts import ended_in_order
from rpo.models.checkpoint import Checkpoint
from rpo.models.config import load_model
from rpo.publishing.model_card import CardFacts, write_model_card
from rpo.reports.rounds import draw_rounds, format_rounds
from rpo.run_lock import sole_owner
from rpo.runs.align_config import AlignConfig
from rpo.runs.settings import keep_settings, require_same_settings
from rpo.shapes.evaluate import load_lora
from rpo.text import write_text
from rpo.trainers.dpo import DPOTrainer
from rpo.trainers.identity import base_identity

ROUNDS = "rounds.jsonl"


@dataclass(frozen=True)
class AlignResult:
    """What a run came to."""

    folder: Path
    lora: Path
    """Of the last round, for the checkpoint itself."""
    rounds: tuple[Mapping[str, Any], ...]
    """The lines of `rounds.jsonl`: the base as round 0, then each round with its yield, its training and its scores."""


def align(config: AlignConfig, *, resume: bool = False, components: Components | None = None) -> AlignResult:
    """Run all rounds.

    Example:
        >>> align(AlignConfig(output="runs/align", rounds=2)).lora       # doctest: +SKIP
        PosixPath('runs/align/lora')
    """
    _check(config)
    held_out = HeldOut(config.held_out)
    if config.curate.source.kind == "generate":
        held_out.refuse_trained(read_prompts(config.curate.source.prompts, seed=config.curate.source.seed))
    folder = Path(config.output)
    with sole_owner(folder), ended_in_order():
        return _rounds(folder, config, held_out, components, resume=resume)


_FREE = ("output", "rounds", "curate.progress", "dpo.loop.progress")
"""Settings that may change in a resumed run."""


def _rounds(
    folder: Path, config: AlignConfig, held_out: HeldOut, components: Components | None, *, resume: bool
) -> AlignResult:
    require_same_settings(folder, config, resume=resume, free=_FREE)
    inputs = _inputs(config, held_out)
    _require_same_inputs(folder, inputs)
    keep_settings(folder, config)
    judged = _Judged(folder, held_out, config)
    done = list(read_lines(folder / ROUNDS))
    if not done:
        done.append(_note(folder, {"round": 0, "inputs": inputs, **judged.entry(None)}))
    for number in range(len(done), config.rounds + 1):
        done.append(_note(folder, _round(config, number, judged, components)))
        if config.curate.progress:
            tqdm.write(format_rounds(done))
    last = _place(folder, len(done) - 1)
    shutil.copytree(last / "lora", folder / "lora", dirs_exist_ok=True)
    write_text(folder / "rounds.svg", draw_rounds(done))
    return AlignResult(folder, folder / "lora", tuple(done))


def _round(config: AlignConfig, number: int, judged: "_Judged", components: Components | None) -> dict[str, Any]:
    """One round, from the LoRA of the last one to its own."""
    folder = Path(config.output)
    place, previous = _place(folder, number), _place(folder, number - 1) / "lora" if number > 1 else None
    run = _curated(config, number, previous, components)
    pairs = _pooled(config, number)
    model = load_model(config.curate.source.model)
    if previous is not None:
        load_lora(model, previous)
        model.pipe.fuse_lora()
        model.pipe.unload_lora_weights()
    dpo = replace(config.dpo, folder=str(place / "dpo"), seed=config.dpo.seed + number - 1)
    trainer = DPOTrainer(model, pairs, dpo)
    trained = trainer.train(resume=trainer.folder.exists())
    own = trainer.save()
    stack_loras([own] if previous is None else [previous, own], place / "lora")
    write_model_card(place / "lora", _card(config, number, len(pairs)))
    return {
        "round": number,
        "yield": _yield(status_of(run)),
        "trained_on": len(pairs),
        "updates": trained.updates,
        "stopped_because": trained.stopped_because,
        **judged.entry(place / "lora"),
    }


def _curated(config: AlignConfig, number: int, previous: Path | None, components: Components | None) -> Path:
    """The curation of a round: its images are drawn with the LoRA of the last one, from noise of its own."""
    settings, place = config.curate, _place(Path(config.output), number)
    source = replace(
        settings.source, lora=str(previous or settings.source.lora), seed=settings.source.seed + number - 1
    )
    settings = replace(settings, output=str(place / "curate"), source=source)
    run = curate(settings, resume=(place / "curate").exists(), components=components)
    export(run, "native", to=place / "pairs")
    return run


def _pooled(config: AlignConfig, number: int) -> PairSet:
    """The pairs of this round and, if wanted, of those before it, the newest first."""
    numbers = range(number, 0, -1) if config.keep_earlier_pairs else [number]
    pairs = [pair for one in numbers for pair in read_pairs(_place(Path(config.output), one) / "pairs")]
    return pair_set(pairs[: config.max_pairs], origin=f"the pairs of round {number}")


class _Judged:
    """The scores of each LoRA on the held-out prompts, beside those of the base."""

    def __init__(self, folder: Path, held_out: HeldOut, config: AlignConfig) -> None:
        """Remember what to judge and where the base's scores are kept."""
        self._held_out = held_out
        self._config = config
        self._file = folder / "base_scores.jsonl"

    def entry(self, lora: Path | None) -> dict[str, Any]:
        """Mean scores and the gain over the base, with its interval; the base alone without a LoRA."""
        is_shown = self._config.curate.progress
        if lora is None:
            scores = self._held_out.judge(self._model(None), progress="base" if is_shown else None)
            self._file.unlink(missing_ok=True)
            for domain, values in scores.scores.items():
                append_line(self._file, {"domain": domain, "scores": values.tolist()})
            return {"scores": scores.means}
        scores = self._held_out.judge(self._model(lora), progress="round" if is_shown else None)
        gains = scores.gain_over(self._base(scores))
        return {"scores": scores.means, "gain": {domain: asdict(gain) for domain, gain in gains.items()}}

    def _model(self, lora: Path | None) -> Checkpoint:
        model = load_model(self._config.curate.source.model)
        if lora is not None:
            load_lora(model, lora)
        return model

    def _base(self, like: HeldOutScores) -> HeldOutScores:
        import numpy as np

        kept = {str(row["domain"]): np.array(row["scores"], np.float64) for row in read_lines(self._file)}
        return HeldOutScores(like.prompts, kept)


def _yield(status: RunStatus) -> dict[str, Any]:
    found: dict[str, Any] = {stage.name: stage.kept for stage in status.stages if stage.name != "decisions"}
    found |= {"pairs": status.num_pairs, "dropped": dict(status.dropped)}
    if (one := status.evaluation) is not None:
        found["evaluation"] = {"better": one.better, "equal": one.equal, "worse": one.worse, "mean_gap": one.mean_gap}
    return found


def _check(config: AlignConfig) -> None:
    """Refuse what cannot be met before anything is spent."""
    check_settings(config.curate)
    if not is_verifier(config.held_out.reward):  # which is the truth, and cannot be taken in
        check_filters(config.curate.decide, config.held_out.reward, config.curate.critic.kind)
    if config.dpo.train != "lora":
        raise InputError(
            f"dpo.train is {config.dpo.train}, but rounds are joined as LoRAs; give dpo.train=lora, or run "
            "`rpo curate` and `rpo train dpo` one after the other"
        )
    if config.curate.source.lora:
        raise InputError(
            f"curate.source.lora is {config.curate.source.lora}, but the first round draws with the checkpoint itself; "
            "leave it out. To go on from a LoRA: `rpo curate` with source.lora, train with it fused (pipe.fuse_lora(); "
            "pipe.unload_lora_weights()), and join both with rpo.adapters.stack.stack_loras([FIRST, NEW], FOLDER)"
        )
    if config.curate.stop_after != "decisions":
        raise InputError(f"curate.stop_after is {config.curate.stop_after}, but a round needs pairs; leave it out")
    if config.rounds > 1 and config.curate.source.kind != "generate":
        raise InputError(
            f"rounds is {config.rounds} and curate.source.kind {config.curate.source.kind}, but only images that the "
            "model draws change from round to round; give rounds=1, or curate.source.kind=generate"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            f"{os.environ['WORLD_SIZE']} processes were started, but rounds go on one; start one, or run `rpo curate` "
            "and `rpo train dpo` on several, one after the other"
        )


def _inputs(config: AlignConfig, held_out: HeldOut) -> dict[str, str]:
    """What a run learns from and is judged by, beside its settings: all of its rounds must have the same."""
    texts: dict[str, Any] = {"held-out prompts": held_out.prompts}
    if config.curate.source.kind == "generate":
        texts["prompts"] = read_prompts(config.curate.source.prompts, seed=config.curate.source.seed)
    told = {name: hashlib.sha256(repr(found).encode()).hexdigest()[:16] for name, found in texts.items()}
    return base_identity(load_model(config.curate.source.model)) | told


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


def _note(folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
    append_line(folder / ROUNDS, entry)
    return entry


def _place(folder: Path, number: int) -> Path:
    return folder / f"round-{number}"


def _card(config: AlignConfig, number: int, num_pairs: int) -> CardFacts:
    base = config.curate.source.model.source
    is_embedded = base == "shapes"
    return CardFacts(
        method="Rich Preference Optimization",
        base_model=None if is_embedded else base,
        base_expression="rpo.shapes.path()" if is_embedded else "",
        imports=("import rpo.shapes",) if is_embedded else (),
        data=f"{num_pairs} pairs of the model's own images and edits of them, made in {number} round(s) of critique, "
        f"instruction and edit, kept where {' and '.join(config.curate.decide.rewards)} found them better.",
        settings=asdict(config.dpo),
        call={
            "num_inference_steps": config.curate.source.num_steps,
            "eta": config.curate.source.eta,
            "guidance_scale": config.curate.source.guidance_scale,
        },
    )
