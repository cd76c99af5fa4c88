"""Watches a run for reward hacking: the trained reward rises, and what it should stand for falls.

A few prompts are drawn before the first update and again every few rollouts, from the same noise, by the same sampler
as the rollouts. The images are judged by the trained rewards and by others that are never trained on; how far images of
one prompt lie apart, and how images look, is measured, too. Prompt by prompt, each number is compared with its own past
(`rpo.evaluation.drift`).

An alarm is a held-out reward or a diversity that has surely fallen, and by enough to matter, while the trained reward
has risen. How images look is logged and drawn to tell *what* the policy does; it raises no alarm, since the images of a
better model look different, too.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor
from tqdm.auto import tqdm

from rpo.data.prompts import AnnotatedPrompt, metadata_of
from rpo.errors import InputError
from rpo.evaluation.drift import moved
from rpo.evaluation.image_statistics import embedder
from rpo.evaluation.watch import alarming, in_words, looks_of, sure_falls
from rpo.files.whole import write_whole
from rpo.randomness import keyed_generator
from rpo.rewards import load_rewards
from rpo.rewards.base import Reward, WeightedRewards
from rpo.sampling.sample import Keep
from rpo.trainers.rollouts.draw import Rollouts
from rpo.trainers.rollouts.settings import LOOK, MonitorConfig, OnlineConfig
from rpo.trainers.trainer import Run
from rpo.training.log import ALARMS, HELD_OUT
from rpo.training.randomness import undisturbed_randomness
from rpo.types import Images

REWARD = "watched/reward"

MAY_FAIL = 0.99
"""Share of the watched images without a score, which are left out; whether a reward fails too often, rollouts tell."""

RISEN = 2.0
"""From which z on the trained reward has risen."""


@dataclass(frozen=True)
class Alarm:
    """Something fell while the trained reward rose."""

    rollout: int
    metric: str
    words: str
    """What fell, for a person."""

    def __str__(self) -> str:
        """A line for a person."""
        return f"rollout {self.rollout}: {self.words} while the reward rose: it may be gamed; look at the images"


def held_out_rewards(trained: WeightedRewards, config: MonitorConfig) -> Mapping[str, Reward]:
    """Load the rewards that a run looks at and does not learn from."""
    found = load_rewards(dict.fromkeys(config.held_out, 1.0)).each if config.held_out else {}
    if both := [name for name in found if name in trained.each]:
        raise InputError(
            f"monitor.held_out names {both[0]}, which is trained on; expected a reward that is not; name another one, "
            "or leave it out"
        )
    return found


@final
class Monitor:
    """Looks at what the policy draws, and tells a fall from noise.

    Attributes:
        alarms: Those so far; something that has recovered may raise another one.
    """

    def __init__(self, run: Run, own: Rollouts, config: OnlineConfig, held_out: Mapping[str, Reward]):
        """Watch by the rewards of the run and by those that are held out.

        Args:
            own: The rollouts of the run: their first prompts are watched.
        """
        trained = own.rewards
        self._run, self._config, self._own = run, config, own
        self._held_out = tuple(held_out)
        every = {
            name: (reward, trained.weights.get(name, 1.0)) for name, reward in {**trained.each, **held_out}.items()
        }
        self._rewards, self._eyes = WeightedRewards(every), embedder(*held_out.values(), *trained.each.values())
        self._rollouts: Rollouts | None = None
        self._watched: list[str] = []
        self._first: dict[str, Tensor] = {}
        self._down, self.alarms = set[str](), list[Alarm]()
        self._shown = list[Images]()

    @property
    def _size(self) -> tuple[int, int]:
        """(prompts, images of each) that this process draws at a look."""
        config, processes = self._config, self._run.processes.count
        return max(1, config.monitor.prompts // processes), min(LOOK, config.rollout.images_per_prompt)

    def notes(self) -> list[str]:
        """What a plan says of it."""
        config, every = self._config, self._config.monitor.every
        if every is None:
            return ["not watched for hacking (monitor.every)"]
        share = config.watched_images / (every * config.rollout.images)
        judges = ", ".join(self._held_out) or "no held-out reward (monitor.held_out names some)"
        return [f"watched for hacking, for {share:.0%} more drawing: {judges}; diversity; how images look"]

    def before(self, index: int) -> dict[str, Tensor]:
        """What is logged of the policy as it is before rollout `index`; NaN where nobody looks.

        Raises:
            RewardError: A reward fails; as for those that are trained on.
        """
        every = self._config.monitor.every
        if every is None:
            return {}
        if index % every:
            names = (*self._first, "watched/fall")
            return {name: torch.full((), torch.nan, device=self._run.model.device) for name in names}
        with undisturbed_randomness(self._run.model.device):
            seen = self._look()
        self._first = self._first or seen
        rise = moved(self._first[REWARD], seen[REWARD])
        falls = sure_falls(self._first, seen) if rise is not None and rise.z >= RISEN else {}
        down = set(alarming(falls, spreads=self._config.monitor.alarm))
        for name in sorted(down - self._down):
            self._raise(Alarm(index, name, in_words(name, falls[name])))
        self._down = down
        worst = max([0.0, *(-move.spreads for name, move in falls.items() if name.startswith(HELD_OUT))])
        facts = {name: values.nanmean() for name, values in seen.items()}
        return {**facts, "watched/fall": torch.tensor(worst, device=self._run.model.device)}

    @property
    def reason(self) -> str | None:
        """Why the run ends, if alarms end it."""
        return f"the monitor raised an alarm, {self.alarms[-1]}" if self._config.monitor.stop and self.alarms else None

    @torch.no_grad()
    def _look(self) -> dict[str, Tensor]:
        """Every number that is watched, by the name of its metric: one for each prompt of all processes."""
        if self._rollouts is None:
            self._rollouts = self._prepared()
        rollout, per_prompt = self._rollouts.draw(0, lambda grid: Keep()), self._size[1]
        images = self._shown.pop()
        found = {f"{HELD_OUT}{name}": rollout.parts[name] for name in self._held_out}
        found[REWARD] = self._own.rewards.weighted_sum(rollout.parts)
        seen = {name: values.unflatten(0, (-1, per_prompt)).nanmean(dim=1) for name, values in found.items()}
        seen |= looks_of(images, per_prompt, eyes=self._eyes)
        if self._config.rollout.rewards_leave:
            self._rewards.leave()
        return {name: self._run.processes.join(values) for name, values in seen.items()}

    def _prepared(self) -> Rollouts:
        """What draws the watched prompts of this process, always from the same noise."""
        prompts, images = self._size
        config, processes = self._config, self._run.processes
        if not self._watched:  # a resumed run looks at what it began with
            self._watched = list(self._own.prompts.visited(range(prompts * processes.count), config.seed))
        if (total := len(self._watched)) % processes.count:
            raise InputError(
                f"the run began with {total} watched prompts, and {processes.count} processes cannot share them "
                f"equally; resume it with a number of processes that divides {total}"
            )
        return self._own.aside(
            replace(config.rollout.of_few(total, images), max_failed=MAY_FAIL),
            seed=keyed_generator("monitor", config.seed, 0).initial_seed(),
            share=(processes.index, processes.count),
            prompts=self._watched,
            rewards=self._rewards,
            on_images=lambda index, images, *_: self._shown.append(images),
        )

    def _raise(self, alarm: Alarm) -> None:
        self.alarms.append(alarm)
        if self._run.processes.is_main:
            tqdm.write(f"ALARM  {alarm}")
            write_whole(self._run.folder / ALARMS, json.dumps([vars(one) for one in self.alarms]))

    def state_dict(self) -> dict[str, Any]:
        """What was seen first, of which prompts, and the alarms."""
        return {
            "prompts": [(str(prompt), json.dumps(metadata_of(prompt))) for prompt in self._watched],
            "first": dict(self._first),
            "down": sorted(self._down),
            "alarms": [dict(vars(one)) for one in self.alarms],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there."""
        self._watched = [AnnotatedPrompt(text, json.loads(known)) for text, known in state_dict["prompts"]]
        self._first = dict(state_dict["first"])
        self._down, self.alarms = set(state_dict["down"]), [Alarm(**one) for one in state_dict["alarms"]]
