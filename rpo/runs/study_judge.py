"""How every model of a study is judged: the same prompts and noise in and out of domain, by the truth and every reward.

The base draws several images of each prompt; the first ones are those that other models are compared with, and among
all of them each reward chooses: what best-of-N by it is worth, before anything is trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from rpo.data.prompt_sets import PromptSet, read_prompt_set
from rpo.errors import InputError
from rpo.evaluation.held_out import FEWEST, Sampling, repeated
from rpo.models.base import DiffusionModel
from rpo.rewards import WeightedRewards, load_reward
from rpo.runs.study_config import TRUTH, StudyConfig

IN_DOMAIN, OUT_OF_DOMAIN = "in_domain", "out_of_domain"
AT_ONCE = 64
"""Images that are judged together."""

Scores = Mapping[str, NDArray[np.float64]]
"""By judge, [prompts, images]."""


@final
class Jury:
    """The truth and every reward, with the prompts that models are judged on.

    Attributes:
        sets: The prompts, by where they are from.
    """

    def __init__(self, config: StudyConfig):
        """Read the prompts and make the rewards; refuses what cannot be judged."""
        held_out = config.held_out
        sources = {IN_DOMAIN: held_out.prompts, OUT_OF_DOMAIN: config.out_of_domain}
        self.sets: dict[str, PromptSet] = {
            name: read_prompt_set(source, count=held_out.count) for name, source in sources.items()
        }
        for name, one in self.sets.items():
            if len(set(one.prompts)) < FEWEST:
                raise InputError(
                    f"{sources[name]!r} has one held-out prompt, but an interval over prompts needs {FEWEST} or more; "
                    "give more, or raise held_out.count"
                )
        names = {TRUTH: held_out.reward, **config.rewards}
        self._rewards = WeightedRewards({label: (load_reward(name), 1.0) for label, name in names.items()})
        self._config = config

    def refuse_trained(self, prompts: list[str]) -> None:
        """Make sure that none of the prompts is trained on."""
        for name, one in self.sets.items():
            if both := sorted(set(prompts) & set(one.prompts)):
                raise InputError(
                    f"{len(both)} of the prompts {name.replace('_', ' ')} are trained on, {both[0]!r} for one; "
                    "expected none, or what is gained would not be gained on new ones; take them out of prompts"
                )

    def scores(
        self, model: DiffusionModel, name: str, *, images: int | None = None, progress: str | None = None
    ) -> Scores:
        """Draw one of the sets and ask every judge.

        Args:
            images: Of each prompt; nothing is as many as models are compared by.
        """
        config, prompts = self._config.held_out, self.sets[name].prompts
        count = images or config.images_per_prompt
        sampling = Sampling(config.seed, count, config.num_steps, config.guidance_scale, eta=config.eta)
        step, found = max(1, AT_ONCE // count), dict[str, list[float]]()
        for start in range(0, len(prompts), step):
            part = prompts[start : start + step]
            told = None if progress is None else f"{progress}, {start} of {len(prompts)}"
            drawn = sampling.draw(model, part, first=(start, 0), batch_size=config.batch_size, progress=told)
            for label, values in self._rewards.parts(drawn.to(model.device), repeated(part, count)).items():
                found.setdefault(label, []).extend(values.double().cpu().tolist())
        self._rewards.leave()  # the next one is trained where they are
        return {label: np.array(values).reshape(-1, count) for label, values in found.items()}


@dataclass(frozen=True)
class Base:
    """The checkpoint before training."""

    candidates: Mapping[str, Scores]
    """By set; out of domain of all images of a prompt, those that are compared first."""
    compared: int
    """How many these are."""

    @property
    def scores(self) -> dict[str, Scores]:
        """Those that models are compared with."""
        return {
            name: {judge: values[:, : self.compared] for judge, values in own.items()}
            for name, own in self.candidates.items()
        }

    def best_of(self, judge: str, count: int) -> NDArray[np.float64]:
        """The truth about what a judge chooses among the first so many images of each prompt out of domain."""
        own = self.candidates[OUT_OF_DOMAIN]
        best = own[judge][:, :count].argmax(1)
        return own[TRUTH][np.arange(len(best)), best]


def judge_base(jury: Jury, model: DiffusionModel, config: StudyConfig, *, progress: bool) -> Base:
    """Draw and judge it."""
    compared = config.held_out.images_per_prompt
    images = {IN_DOMAIN: compared, OUT_OF_DOMAIN: max(config.best_of, compared)}
    found = {
        name: jury.scores(model, name, images=count, progress=f"base, {name}" if progress else None)
        for name, count in images.items()
    }
    return Base(found, compared)


def told(scores: Mapping[str, Scores]) -> dict[str, Any]:
    """As JSON has them."""
    return {name: {judge: values.tolist() for judge, values in own.items()} for name, own in scores.items()}


def untold(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, Scores]:
    """What `told` gave."""
    return {name: {judge: np.array(values) for judge, values in own.items()} for name, own in scores.items()}
