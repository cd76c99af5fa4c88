"""What follows from the cells of a study: gains over the base with intervals, and whether best-of-N told them before.

Cells that differ in nothing but their seed are one group, compared with the base image by image; images of one prompt
count together, whatever the seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from rpo.data.prompt_sets import PromptSet
from rpo.evaluation.contest import Contest, contest
from rpo.evaluation.held_out import repeated
from rpo.evaluation.intervals import Interval, paired_gain
from rpo.evaluation.ranks import rank_agreement
from rpo.runs.study_config import TRUTH, StudyConfig
from rpo.runs.study_judge import OUT_OF_DOMAIN, Base

AXES = ("images_per_prompt", "share", "rounds")

TITLES = {"dpo": "DPO on ranked pairs", "rich": "DPO on rich pairs", "grpo": "GRPO", "endpoint": "endpoint"}


@dataclass(frozen=True)
class Group:
    """The cells of all seeds at one place of the grid."""

    algorithm: str
    reward: str
    axes: tuple[Any, ...]
    """Images of a prompt, share of the prompts, rounds."""
    cells: tuple[Mapping[str, Any], ...]

    @property
    def title(self) -> str:
        """What a person calls it, where the axes are known."""
        return f"{TITLES[self.algorithm]}, {self.reward}"

    def scores(self, name: str, judge: str) -> NDArray[np.float64]:
        """[seeds, prompts, images]."""
        return np.array([one["scores"][name][judge] for one in self.cells])


@final
@dataclass(frozen=True)
class StudyFindings:
    """All that is known so far."""

    config: StudyConfig
    base: Base
    sets: Mapping[str, PromptSet]
    results: tuple[Mapping[str, Any], ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def judges(self) -> list[str]:
        """The truth first."""
        return [TRUTH, *self.config.rewards]

    @property
    def counts(self) -> list[int]:
        """Images among which rewards choose: 2, 4, … and the most."""
        most = self.config.best_of
        return sorted({*(2**power for power in range(1, most.bit_length()) if 2**power < most), most})

    def best_of(self, judge: str, count: int) -> Contest:
        """What a judge chooses against the first image, out of domain and by the truth."""
        first = self.base.candidates[OUT_OF_DOMAIN][TRUTH][:, 0]
        best = self.base.best_of(judge, count)
        return contest(judge, first.tolist(), best.tolist(), self.sets[OUT_OF_DOMAIN].prompts)

    @cached_property
    def groups(self) -> list[Group]:
        """All that have a finished cell."""
        found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
        for one in self.results:
            key = (one["algorithm"], one["reward"], *(one[axis] for axis in AXES))
            found.setdefault(key, []).append(one)
        return [Group(key[0], key[1], key[2:], tuple(cells)) for key, cells in found.items()]

    @cached_property
    def center(self) -> list[Group]:
        """Those at the first value of each axis."""
        return [one for one in self.groups if one.axes == self.first]

    @property
    def first(self) -> tuple[Any, ...]:
        """The first value of each axis."""
        return self.config.images_per_prompt[0], self.config.shares[0], self.config.rounds[0]

    def contest(self, group: Group, name: str, judge: str, title: str = "") -> Contest:
        """A group against the base."""
        return self._contest(title or group.title, [self._base(name, judge)], [group.scores(name, judge)], name)

    def gain(self, group: Group, name: str, judge: str) -> Interval:
        """The difference alone."""
        after = group.scores(name, judge)
        before = np.broadcast_to(self._base(name, judge), after.shape)
        return paired_gain(before.ravel(), after.ravel(), groups=self._prompts(name, len(after)), seed=0)

    def contrasts(self, name: str) -> list[Contest]:
        """Every two algorithms by the truth, over all rewards and seeds that both have finished."""
        found = list[Contest]()
        for one, other in combinations(self.config.algorithms, 2):
            sides = [{group.reward: group for group in self.center if group.algorithm == way} for way in (one, other)]
            before, after = list[NDArray[np.float64]](), list[NDArray[np.float64]]()
            for reward in [reward for reward in sides[0] if reward in sides[1]]:
                own, theirs = ({cell["seed"]: cell for cell in side[reward].cells} for side in sides)
                for seed in sorted(own.keys() & theirs.keys()):
                    before.append(np.array([own[seed]["scores"][name][TRUTH]]))
                    after.append(np.array([theirs[seed]["scores"][name][TRUTH]]))
            if before:
                found.append(self._contest(f"{TITLES[other]} against {TITLES[one]}", before, after, name))
        return found

    def agreement(self, algorithms: Sequence[str]) -> Interval | None:
        """How well best-of-N orders rewards as training by these algorithms does, out of domain and by the truth.

        Nothing where fewer than two rewards were trained on with the same seeds by all of them.
        """
        rewards = list(self.config.rewards)
        own = {(one.algorithm, one.reward): one for one in self.center}
        every = [own.get((way, reward)) for reward in rewards for way in algorithms]
        seeds = {tuple(cell["seed"] for cell in one.cells) for one in every if one is not None}
        if None in every or len(seeds) != 1 or len(rewards) < 2:  # noqa: PLR2004 - an order
            return None
        before = np.stack([self.base.best_of(reward, self.config.best_of) for reward in rewards])
        trained = [[own[way, reward].scores(OUT_OF_DOMAIN, TRUTH) for way in algorithms] for reward in rewards]
        after = np.array(trained).mean(axis=(1, 4))  # [rewards, seeds, prompts]
        return rank_agreement(before, after, seed=0)

    def ordered(self, algorithms: Sequence[str]) -> list[str]:
        """Rewards by what training with them came to out of domain, the best first."""
        worth = {
            reward: np.mean(
                [
                    one.scores(OUT_OF_DOMAIN, TRUTH).mean()
                    for one in self.center
                    if one.reward == reward and one.algorithm in algorithms
                ]
            )
            for reward in self.config.rewards
        }
        return sorted(worth, key=lambda reward: -worth[reward])

    @property
    def ordered_before(self) -> list[str]:
        """Rewards by best-of-N, the best first."""
        worth = {reward: self.base.best_of(reward, self.config.best_of).mean() for reward in self.config.rewards}
        return sorted(worth, key=lambda reward: -worth[reward])

    def is_share(self, judge: str) -> bool:
        """Whether a judge says yes or no."""
        every = [own[judge] for own in self.base.scores.values()]
        return all(bool(np.isin(one, (0.0, 1.0)).all()) for one in every)

    def _base(self, name: str, judge: str) -> NDArray[np.float64]:
        return self.base.scores[name][judge][None]

    def _contest(
        self, title: str, before: Sequence[NDArray[np.float64]], after: Sequence[NDArray[np.float64]], name: str
    ) -> Contest:
        every = np.concatenate(after)
        base = np.broadcast_to(np.concatenate(before), every.shape)
        return contest(title, base.ravel().tolist(), every.ravel().tolist(), self._prompts(name, len(every)))

    def _prompts(self, name: str, times: int) -> list[str]:
        return repeated(self.sets[name].prompts, self.base.compared) * times
