"""`rpo evaluate`: whether a LoRA is better, and by how much: the same prompts and noise for the base and for each.

    evaluation.json    the numbers, and all that makes them comparable; see `rpo.evaluation.result`
    report.html        the same for a person, with images side by side
    images/            those of each model, named by prompt and image as `Sampling` counts them, from 0
    pinned.json        what is compared and how: another command is refused here
    scores.jsonl       every score, as soon as it is known

Prompts are drawn and judged some at a time, always the same ones together. A killed evaluation goes on where it was: a
batch that is there is not drawn again, and a reward is not asked again. Rewards judge what the files hold, 8 bits a
colour. Best-of-N draws N candidates for each image by the base, the first of which is the base's own; one reward
chooses, and the others are asked of what it chose.
"""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from rpo.adapters.loading import load_model
from rpo.adapters.lora_file import inspect_lora
from rpo.adapters.strength import at_strength
from rpo.data.pixels import to_pixels
from rpo.data.prompt_sets import PromptSet, read_prompt_set
from rpo.errors import InputError
from rpo.evaluation.contest import contests, embedding_diversity, pixel_diversity
from rpo.evaluation.held_out import FEWEST, Sampling, repeated
from rpo.evaluation.result import RESULT, Compared, Evaluation
from rpo.files.lock import sole_owner
from rpo.models.checkpoint import Checkpoint, refuse_editor
from rpo.models.config import ModelConfig
from rpo.models.usual import usual_guidance, usual_steps
from rpo.rewards import Reward, load_reward, score
from rpo.rewards.version import EmbedsImages, version_of
from rpo.runs.evaluate_report import write_evaluation_report
from rpo.runs.evaluate_store import Kept, claim
from rpo.runs.evaluate_wish import Entrant, EvaluationWish, entrants_of, shown
from rpo.runs.sample import load_loras, refuse_unusual
from rpo.runs.sample_wish import adapter, size_of
from rpo.sampling.sample import images_at_once, solving
from rpo.trainers.identity import base_identity
from rpo.training.made_with import made_with
from rpo.types import Images

PAGE = "report.html"
PIXELS = "pixels"
"""The measure of diversity that needs no reward."""


def evaluate(wish: EvaluationWish, *, resume: bool = False) -> tuple[Evaluation, Path]:
    """Draw, judge and compare.

    Args:
        resume: Go on with an evaluation that was killed, with the same wish.

    Returns:
        What came of it, and the page.

    Raises:
        InputError: A model, prompts, a reward or a number cannot be; the folder holds another evaluation.
    """
    entrants = entrants_of(wish)
    prompts = read_prompt_set(wish.prompts, count=wish.count, categories=wish.categories)
    if len(set(prompts.prompts)) < FEWEST:
        raise InputError(
            f"{wish.prompts} has one prompt, but an interval over prompts needs {FEWEST} or more; give more, or raise "
            "--count"
        )
    size = size_of(wish.size)
    if wish.output.is_file():
        raise InputError(f"{wish.output} is a file; expected a folder; give another --output")
    rewards = {shown(name): load_reward(name) for name in wish.rewards}
    with sole_owner(wish.output):
        claim(wish.output, resume=resume)
        hashes = {one.label: _hashes(one, wish) for one in entrants if one.kind in ("checkpoint", "lora")}
        model = _load(wish.model)
        refuse_unusual(model, wish.steps, wish.guidance)
        canvas = model.canvas_of(size)
        sampling = Sampling(
            wish.seed,
            wish.images_per_prompt,
            usual_steps(model, wish.steps),
            usual_guidance(model, wish.guidance),
            wish.eta,
            wish.solver,
            canvas=canvas,
        )
        solving(model, usual_steps(model, wish.steps), solver=wish.solver, eta=wish.eta, canvas=canvas)  # or refused
        hashes |= {one.label: base_identity(model) for one in entrants if one.kind in ("base", "best-of")}
        at_once = wish.batch_size or images_at_once(canvas)
        work = _Evaluating(wish, entrants, prompts, rewards, sampling, at_once)
        kept = work.begin(pinned := work.pinned(hashes, str(model.device)))
        with work.bar:
            work.enter_all(model)
            del model
            work.enter_checkpoints()
        found = work.result(pinned)
        found.write(wish.output / RESULT)
        return found, write_evaluation_report(found, kept, wish.output / PAGE)


def _load(config: ModelConfig) -> Checkpoint:
    model = load_model(replace(config, allow_distilled=True))  # drawing undoes nothing
    refuse_editor(model, "`rpo evaluate`")
    return model


def _hashes(entrant: Entrant, wish: EvaluationWish) -> dict[str, str]:
    if entrant.lora:
        found = inspect_lora(entrant.lora.path)
        return {"sha256": found.sha256, "content": found.key}
    return base_identity(_load(replace(wish.model, source=entrant.source)))


@final
@dataclass
class _Evaluating:
    """What is drawn and judged, some prompts at a time."""

    wish: EvaluationWish
    entrants: Sequence[Entrant]
    prompts: PromptSet
    rewards: Mapping[str, Reward]
    sampling: Sampling
    at_once: int
    kept: Kept = field(init=False)
    bar: Any = field(init=False)

    def pinned(self, hashes: Mapping[str, Mapping[str, str]], device: str) -> dict[str, Any]:
        """All that makes numbers comparable, without a path of this machine.

        Args:
            hashes: What each entrant is, by its label.
        """
        made, wish = made_with("EvaluationWish", {}), self.wish
        models = [
            {
                "label": one.label,
                "kind": one.kind,
                "source": shown(str(one.lora.path) if one.lora else one.source),
                **({"strength": one.lora.strength} if one.lora else {}),
                "hashes": dict(hashes[one.label]),
            }
            for one in self.entrants
        ]
        drawn = asdict(self.sampling)
        height, width = drawn.pop("canvas")
        where = made.machine["device"] if device.startswith("cuda") else device
        listed, content = self.prompts.listed, self.prompts.sha256
        return {
            "models": models,
            "prompts": {"source": shown(self.prompts.source), "sha256": content, "list": listed},
            "sampling": {
                **drawn,
                "height": height,
                "width": width,
                "dtype": wish.model.dtype,
                "images_at_once": self.at_once,
            },
            "rewards": {name: version_of(reward) for name, reward in self.rewards.items()},
            "best_of": {"count": wish.best_of, "by": wish.chooser} if wish.best_of else None,
            "made_with": {**made.versions, "rpo's files": made.code["rpo's files"], "device": where},
        }

    def begin(self, pinned: Mapping[str, Any]) -> Kept:
        """Take the folder, and say how much there is to do."""
        self.kept = Kept(self.wish.output, [one.label for one in self.entrants], pinned)
        images = len(self.prompts.prompts) * self.sampling.images_per_prompt
        total = images * (len(self.entrants) + max(0, (self.wish.best_of or 0) - 1))
        self.bar = tqdm(total=total, unit="image", disable=not self.wish.progress, dynamic_ncols=True)
        return self.kept

    @property
    def parts(self) -> list[range]:
        """Numbers of the prompts that are drawn together."""
        count, step = len(self.prompts.prompts), max(1, self.at_once // self.sampling.images_per_prompt)
        return [range(start, min(start + step, count)) for start in range(0, count, step)]

    def enter_all(self, base: Checkpoint) -> None:
        """Draw and judge what is not there yet of the base, with and without LoRAs."""
        loras = [one.lora for one in self.entrants if one.lora]
        load_loras(base, loras)
        for one in self.entrants:
            on = {adapter(number): lora.strength * (lora is one.lora) for number, lora in enumerate(loras)}
            enter = {"base": self._enter, "lora": self._enter, "best-of": self._best}.get(one.kind)
            if enter is not None:
                with at_strength(base, on):
                    enter(base, one)

    def enter_checkpoints(self) -> None:
        """The same of whole checkpoints, of which one is in memory at a time."""
        for one in self.entrants:
            if one.kind == "checkpoint":
                gc.collect()  # what the one before took
                self._enter(_load(replace(self.wish.model, source=one.source)), one)

    def _enter(self, model: Checkpoint, one: Entrant) -> None:
        for part in self.parts:
            self.bar.set_description(one.label)
            pixels = self._drawn(model, one.label, part, range(self.sampling.images_per_prompt))
            for name in self.rewards:
                self._judge(model, one.label, name, part, pixels)
            self._diversity(model, one.label, part, pixels)

    def _best(self, model: Checkpoint, one: Entrant) -> None:
        """The best of N candidates for each image: the base's own, and others."""
        per_prompt, by = self.sampling.images_per_prompt, self.wish.chooser
        others = range(per_prompt, per_prompt * (self.wish.best_of or 0))
        for part in self.parts:
            self.bar.set_description(one.label)
            pixels = self._drawn(model, self.entrants[0].label, part, others)
            tried = self._judge(model, self.kept.CANDIDATES, by, part, pixels)
            own = self.kept.scores(self.entrants[0].label, by, part.start)
            every = np.hstack([np.reshape(one, (len(part), -1)) for one in (own, tried)])
            every = every.reshape(len(part), -1, per_prompt)  # prompt, candidate, image
            best = every.argmax(1)
            chosen = (best * per_prompt + np.arange(per_prompt)).ravel().tolist()
            self.kept.choose(part.start, chosen)
            self.kept.add(one.label, by, part.start, every.max(1).ravel().tolist())
            numbers = [(part[place // per_prompt], image) for place, image in enumerate(chosen)]
            files = [self.kept.file(self.entrants[0].label, prompt, image) for prompt, image in numbers]
            pixels, is_other = self.kept.read(files), np.asarray(chosen) >= per_prompt
            for name in self.rewards:
                self._judge(model, one.label, name, part, pixels, known=(self.entrants[0].label, is_other))
            self._diversity(model, one.label, part, pixels)
            self.bar.update(len(files))

    def _drawn(self, model: Checkpoint, label: str, part: range, images: range) -> NDArray[np.uint8]:
        """The images of some prompts, from the disk or, where any is missing, drawn anew."""
        files = [self.kept.file(label, prompt, image) for prompt in part for image in images]
        if not all(file.is_file() for file in files):
            drawn = replace(self.sampling, images_per_prompt=len(images)).draw(
                model,
                self.prompts.prompts[part.start : part.stop],
                first=(part.start, images.start),
                batch_size=self.at_once,
            )
            self.kept.write(files, to_pixels(drawn))
        self.bar.update(len(files))
        return self.kept.read(files)

    def _judge(
        self,
        model: Checkpoint,
        label: str,
        name: str,
        part: range,
        pixels: NDArray[np.uint8],
        known: tuple[str, NDArray[np.bool_]] | None = None,
    ) -> list[float]:
        """The scores of some prompts' images, asked for where they are not there yet.

        Args:
            known: A model whose scores these images have, and which of them are others.
        """
        if found := self.kept.scores(label, name, part.start):
            return found
        texts = repeated(self.prompts.prompts[part.start : part.stop], len(pixels) // len(part))
        whose, asked = known or ("", np.ones(len(pixels), bool))
        values = np.zeros(len(pixels)) if known is None else np.array(self.kept.scores(whose, name, part.start))
        if asked.any():
            places = np.flatnonzero(asked)
            values[places] = (
                score(
                    self.rewards[name],
                    _as_images(pixels[places]).to(model.device),
                    [texts[place] for place in places],
                    name=name,
                    evidence=self.wish.output / "faults",
                )
                .double()
                .cpu()
                .numpy()
            )
        self.kept.add(label, name, part.start, values.tolist())
        return values.tolist()

    def _diversity(self, model: Checkpoint, label: str, part: range, pixels: NDArray[np.uint8]) -> None:
        per_prompt = self.sampling.images_per_prompt
        if per_prompt == 1:
            return
        for name in self._measures:
            if self.kept.scores(label, name, part.start, is_diversity=True):
                continue
            values = pixel_diversity(pixels, per_prompt)
            reward = self.rewards.get(name)
            if isinstance(reward, EmbedsImages):
                with torch.no_grad():
                    embedded = reward.embed_images(_as_images(pixels).to(model.device))
                values = embedding_diversity(embedded, per_prompt)
            self.kept.add(label, name, part.start, values, is_diversity=True)

    @property
    def _measures(self) -> list[str]:
        return [PIXELS, *(name for name, one in self.rewards.items() if isinstance(one, EmbedsImages))]

    def result(self, pinned: Mapping[str, Any]) -> Evaluation:
        """All of it, compared."""
        per_prompt = self.sampling.images_per_prompt
        of_images = {
            "categories": repeated(self.prompts.categories, per_prompt),
            "groups": repeated(self.prompts.prompts, per_prompt),
        }
        of_prompts = {"categories": self.prompts.categories, "groups": self.prompts.prompts}
        compared, diversity = list[Compared](), list[Compared]()
        for one, other in combinations(self.entrants, 2):
            judges = [name for name in self.rewards if not (self._is_best(one, other) and name == self.wish.chooser)]
            for name in judges:
                rows = contests(self.kept.all(one.label, name), self.kept.all(other.label, name), **of_images)
                compared.append(Compared(one.label, other.label, name, rows))
            for name in self._measures if per_prompt > 1 else ():
                sides = [self.kept.all(side.label, name, is_diversity=True) for side in (one, other)]
                diversity.append(Compared(one.label, other.label, name, contests(*sides, **of_prompts)))
        scores = {
            one.label: {name: tuple(self.kept.all(one.label, name)) for name in self.rewards} for one in self.entrants
        }
        return Evaluation(pinned, tuple(compared), tuple(diversity), self.kept.chosen, scores)

    @staticmethod
    def _is_best(*sides: Entrant) -> bool:
        return any(one.kind == "best-of" for one in sides)


def _as_images(pixels: NDArray[np.uint8]) -> Images:
    return torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float() / 255
