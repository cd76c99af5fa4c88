"""The cells of a study: what each of them trains, and how long, so that all cost as many evaluations of the denoiser.

    budget / rounds ≥ prompts · images · (drawing + edit) + updates · U of an update       for pairs, of each round
    budget / rounds ≥ updates · U of an update                                             for what draws as it learns

Updates are as many as fit, so that a cell falls short of the budget by less than one update of each of its rounds. Of a
round of pairs, at most the share `drawing` goes into images: with more images of a prompt there are fewer prompts.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rpo.curation.curate_config import ChatConfig, CurateConfig, EditorConfig
from rpo.errors import InputError
from rpo.evaluation.held_out import FEWEST
from rpo.runs.align_config import AlignConfig
from rpo.runs.price import price
from rpo.runs.study_config import StudyConfig, Way
from rpo.runs.train_config import DPORunConfig, EndpointRunConfig, GRPORunConfig
from rpo.trainers.rollouts.settings import MonitorConfig

ONLINE: dict[str, Any] = {"grpo": GRPORunConfig, "endpoint": EndpointRunConfig}
"""What draws as it learns: the settings of its run."""

BETWEEN_SEEDS = 1000
"""So far apart are seeds, that rounds of one do not draw what another draws."""

WATCHED = "watched.jsonl"
"""The prompts that rounds of pairs are judged by on their way, which nobody looks at here."""


@dataclass(frozen=True)
class Prices:
    """What the work of a denoiser costs, in U: one image through it, forward."""

    backward: Mapping[str, float]
    """Of an image through it and back, by algorithm."""
    guided: bool
    """Whether guidance costs a second one."""


@dataclass(frozen=True)
class StudyPlace:
    """Where in the grid a cell is."""

    algorithm: Way
    reward: str
    images_per_prompt: int
    share: float
    rounds: int
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        axes = f"n{self.images_per_prompt}-p{self.share:g}-r{self.rounds}"
        return f"{self.algorithm}-{self.reward}-{axes}-s{self.seed}"


@dataclass(frozen=True)
class StudyCell:
    """One of them, with all that its training needs."""

    place: StudyPlace
    prompts: int
    """What it is trained on; of pairs, as many as the budget buys images of."""
    updates: int
    """Of each round."""
    update: float
    """U of one."""
    planned: float
    """U of all."""
    image: float
    """U of an image that pairs are made of; 0 where they are drawn within updates."""
    runs: tuple[Any, ...]
    """An `AlignConfig`, or the settings of a run of each round."""

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.place.name


def places(config: StudyConfig) -> Iterator[StudyPlace]:
    """The grid, seed by seed: every algorithm with every reward, then each axis by itself."""
    axes = {"images_per_prompt": config.images_per_prompt, "share": config.shares, "rounds": config.rounds}
    walked = list(config.rewards) if config.walked is None else list(config.walked)
    first: dict[str, Any] = {name: values[0] for name, values in axes.items()}
    for seed in config.seeds:
        for reward in config.rewards:
            for algorithm in config.algorithms:
                yield StudyPlace(algorithm, reward, **first, seed=seed)
        for reward in walked:
            for name, values in axes.items():
                for value in values[1:]:
                    for algorithm in config.algorithms:
                        yield StudyPlace(algorithm, reward, **{**first, name: value}, seed=seed)


def cells_of(config: StudyConfig, prices: Prices, prompts: int) -> list[StudyCell]:
    """All cells, in the order in which they are run.

    Args:
        prices: Of the checkpoint.
        prompts: How many there are to train on.

    Raises:
        InputError: The budget of a cell is too small for an update of each round, or its settings cannot be.
    """
    found = list[StudyCell]()
    for place in places(config):
        make = _online if place.algorithm in ONLINE else _pairs
        try:
            found.append(make(config, prices, place, max(1, round(place.share * prompts))))
        except InputError as error:
            raise InputError(f"the cell {place.name}: {error}") from error
    return found


def prompts_file(config: StudyConfig, count: int) -> Path:
    """Where the first so many prompts are."""
    return Path(config.output) / f"prompts-{count}.jsonl"


def folder_of(config: StudyConfig, place: StudyPlace) -> Path:
    """Where a cell is."""
    return Path(config.output) / "cells" / place.name


def _pairs(config: StudyConfig, prices: Prices, place: StudyPlace, prompts: int) -> StudyCell:
    """Rounds of drawing, ordering or editing, and DPO."""
    source, is_rich = config.curate.source, place.algorithm == "rich"
    assert source.num_steps is not None and source.guidance_scale is not None
    image = source.num_steps * (2.0 if prices.guided and source.guidance_scale > 1 else 1.0)
    with_edit = image + is_rich * config.edited * config.edit_cost
    a_round, of_prompt = config.budget / place.rounds, place.images_per_prompt * with_edit
    count = min(prompts, int(config.drawing * a_round / of_prompt))
    update = price(DPORunConfig(**fields_of(config.dpo)), prices.backward["dpo"], guided=prices.guided)
    updates = int((a_round - count * of_prompt) / update)
    least = max(of_prompt / config.drawing, update / (1 - config.drawing))
    _require(config, count and updates, place.rounds * least)
    folder = folder_of(config, place) / "run"
    held_out = replace(
        config.held_out,
        prompts=str(Path(config.output) / WATCHED),
        count=FEWEST,
        images_per_prompt=1,
        reward=_another(config.rewards[place.reward]),
    )
    run = AlignConfig(
        output=str(folder),
        seed=BETWEEN_SEEDS * place.seed,
        rounds=place.rounds,
        curate=_curation(config, place, prompts, count),
        dpo=_of_cell(config.dpo, updates),
        held_out=held_out,
    )
    planned = place.rounds * (count * of_prompt + updates * update)
    return StudyCell(place, count, updates, update, planned, image, (run,))


def _curation(config: StudyConfig, place: StudyPlace, prompts: int, count: int) -> CurateConfig:
    curate = config.curate
    source = replace(
        curate.source,
        model=config.model,
        prompts=str(prompts_file(config, prompts)),
        limit=count,
        images_per_prompt=place.images_per_prompt,
    )
    decide = replace(curate.decide, rewards={config.rewards[place.reward]: 0.0}, min_chosen={})
    found = replace(curate, source=source, decide=decide, evaluation="", progress=False)
    if place.algorithm == "rich":
        return found
    return replace(
        found,
        critic=ChatConfig(kind="nothing"),
        instructor=ChatConfig(),
        editor=EditorConfig(),
        instruct_sound=False,
        decide=replace(decide, orderings="prompt", similarity_model=""),
    )


def _online(config: StudyConfig, prices: Prices, place: StudyPlace, prompts: int) -> StudyCell:
    """Runs that draw what they learn from, each from the LoRA of the one before."""
    section = getattr(config, place.algorithm)
    group = place.images_per_prompt
    groups = min(prompts, max(1, section.rollout.images // group))
    section = replace(section, rollout=replace(section.rollout, prompts=groups, images_per_prompt=group))
    section = replace(section, monitor=MonitorConfig(every=None, canaries=False))
    cls, folder = ONLINE[place.algorithm], folder_of(config, place)
    given = {
        "prompts": str(prompts_file(config, prompts)),
        "rewards": {config.rewards[place.reward]: 1.0},
        "held_out": None,
        "report": False,
    }
    update = price(cls(**fields_of(section)), prices.backward[place.algorithm], guided=prices.guided)
    each = section.steps.updates_per_rollout
    updates = int(config.budget / place.rounds / update) // each * each
    _require(config, updates, place.rounds * update * each)
    runs, model = list[Any](), config.model
    for number in range(1, place.rounds + 1):
        output = folder / f"round-{number}"
        seed = section.seed + BETWEEN_SEEDS * place.seed + number - 1
        own = replace(_of_cell(section, updates), output=str(output), seed=seed)
        runs.append(cls(**fields_of(own), model=model, **given))
        model = replace(model, lora=str(output / "lora"))
    return StudyCell(place, prompts, updates, update, place.rounds * updates * update, 0.0, tuple(runs))


def _of_cell(section: Any, updates: int) -> Any:
    """The settings of an algorithm, as long as a cell is."""
    learning = replace(section.learning, updates=updates, progress=False)
    return replace(section, learning=learning, preview_every=0)


def _require(config: StudyConfig, enough: int, least: float) -> None:
    if not enough:
        raise InputError(
            f"budget is {config.budget:,}, which does not buy an update of each round; {math.ceil(least):,} "
            "evaluations do: raise budget, or make an update smaller"
        )


def _another(reward: str) -> str:
    """A reward that is cheap and another one."""
    return "jpeg-incompressibility" if reward == "jpeg-compressibility" else "jpeg-compressibility"


def fields_of(section: Any) -> dict[str, Any]:
    """The settings of a section by name, for a class that has them and more."""
    return {one.name: getattr(section, one.name) for one in fields(section)}
