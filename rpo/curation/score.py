"""Scores of source and edit, by every reward, against the caption that the source was made for.

The rewards that filter and the one that evaluates are asked together and kept apart: `decide` sees the former only. A
reward that gives no finite number for an image is that record's fault; one that raises stops the run.
"""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from typing import cast, final

import numpy as np
import torch
from PIL.Image import Image

from rpo.curation.curate_config import DecideConfig
from rpo.curation.faults import ask_each
from rpo.curation.pipeline import cut
from rpo.curation.records import Critic, Critique, Fault, Scores
from rpo.errors import InputError
from rpo.rewards import REWARDS, Reward, RewardError, load_reward, name_of, score
from rpo.rewards.clip import CHECKPOINTS, ClipReward

CRITIC = "critic"
"""Name of the critic's overall judgement among the rewards of `DecideConfig`."""

_VERIFIER = "rpo.shapes.reward:"  # its gradings are one judge


@dataclass(frozen=True)
class ToScore:
    """An image and its edit, if there is one."""

    caption: str
    source: Image
    edit: Image | None
    critique: Critique | None = None
    """Of the source, where it is known."""
    others: Sequence[Image] = ()
    """Further edits."""

    @property
    def numbered(self) -> list[tuple[int, Image]]:
        """Further edits with their numbers, from 1."""
        return list(enumerate(self.others, start=1))


@final
@dataclass(frozen=True)
class Scorer:
    """Asks rewards for scores."""

    filters: Mapping[str, Reward]
    evaluation: Reward | None
    similarity: "ImageSimilarity | None" = None
    device: str = "cpu"
    critic: Critic | None = None
    """Where its mark is one of the scores."""

    def load(self) -> None:
        """Load what is otherwise loaded with the first image, so that what is missing is known before work is done."""
        named = {f"the reward {name!r} of decide.rewards": reward for name, reward in self.filters.items()}
        named |= {"the reward that evaluates": self.evaluation} if self.evaluation else {}
        named |= {"decide.similarity_model": self.similarity.reward} if self.similarity else {}
        blank = torch.ones(1, 3, 64, 64, device=self.device)
        for who, reward in named.items():
            if isinstance(reward, ClipReward):
                try:
                    with torch.no_grad():
                        reward.embed_images(blank)
                except Exception as error:  # a damaged file may raise anything
                    raise InputError(
                        f"{who} cannot be loaded ({type(error).__name__}: {error}); expected a whole checkpoint; mend "
                        "it or name another, then run again: nothing was drawn, and nobody was asked"
                    ) from error

    def __call__(self, items: Sequence[ToScore]) -> list[Scores | Fault]:
        """The scores of each item; an item whose scores are not finite is a fault."""
        try:
            return self._score(items)
        except RewardError as error:
            if not isinstance(error.__cause__, RewardError):
                raise
            if len(items) == 1:
                return [Fault("invalid", str(error))]
        return [answer for item in items for answer in self([item])]

    def _score(self, items: Sequence[ToScore]) -> list[Scores | Fault]:
        edited = {index: item for index, item in enumerate(items) if item.edit is not None}
        further = [(index, f"edit-{number}", one) for index, item in edited.items() for number, one in item.numbered]
        shown = [(index, "source", item.source) for index, item in enumerate(items)]
        shown += [(index, "edit", item.edit) for index, item in edited.items() if item.edit is not None] + further
        images, captions = [image for _, _, image in shown], [items[index].caption for index, _, _ in shown]
        places: list[dict[str, int]] = [{} for _ in items]
        for place, (index, kind, _) in enumerate(shown):
            places[index][kind] = place
        filtered: dict[str, Sequence[float | Fault]] = {
            name: self._ask(reward, images, captions, name) for name, reward in self.filters.items()
        }
        if self.critic is not None:
            known = [item.critique for item in items] + [None] * (len(shown) - len(items))
            filtered = {CRITIC: critic_marks(self.critic, images, captions, known), **filtered}
        judged = self._ask(self.evaluation, images, captions, "evaluation") if self.evaluation is not None else None
        pairs = [(items[index].source, images[places[index]["edit"]]) for index in edited]
        alike = dict(zip(edited, self.similarity(pairs), strict=True)) if self.similarity is not None and pairs else {}
        return [
            _joined(item, own, filtered, judged, alike.get(index))
            for index, (item, own) in enumerate(zip(items, places, strict=True))
        ]

    def _ask(self, reward: Reward, images: Sequence[Image], captions: Sequence[str], name: str) -> list[float]:
        return score_images(reward, images, captions, name=name, device=self.device)


@final
class ImageSimilarity:
    """The cosine of two images' embeddings by a CLIP checkpoint.

    Attributes:
        reward: Has the checkpoint.
    """

    def __init__(self, model: str, device: str = "cpu") -> None:
        """Name the checkpoint; it is loaded when the first images come.

        Args:
            model: Folder or hub id of a CLIPModel with its image processor.
        """
        self.reward = ClipReward(model, device=device)

    def __call__(self, pairs: Sequence[tuple[Image, Image]]) -> list[float]:
        """Of each pair, from -1 to 1; 1 for the same image. Images of one size go through the model together."""
        found = torch.zeros(len(pairs))
        sizes = [(first.size, second.size) for first, second in pairs]
        for size in dict.fromkeys(sizes):
            places = [place for place, one in enumerate(sizes) if one == size]
            sides = zip(*(pairs[place] for place in places), strict=True)
            with torch.no_grad():
                first, second = (self.reward.embed_images(_tensor(side)) for side in sides)
            found[places] = (first * second).sum(-1).float().cpu()
        return found.tolist()


def critic_marks(
    critic: Critic, images: Sequence[Image], captions: Sequence[str], known: Sequence[Critique | None]
) -> list[float | Fault]:
    """What a critic thinks of each image overall, 1 to 10; it is asked where the critique is not known.

    An answer that is no critique is its record's fault, as everywhere else.
    """

    def ask(batch: Sequence[int]) -> list[Critique | Fault]:
        return ask_each(lambda some: critic([images[one] for one in some], [captions[one] for one in some]), batch)

    places = [place for place, critique in enumerate(known) if critique is None]
    with ThreadPoolExecutor(critic.concurrency) as pool:
        asked = [pool.submit(copy_context().run, ask, some) for some in cut(places, critic.batch_size)]
        answers = [answer for some in asked for answer in some.result()]
    found: list[object] = list(known)
    for place, answer in zip(places, answers, strict=True):
        found[place] = answer
    return [_mark(one) for one in found]


def _mark(answer: object) -> float | Fault:
    if isinstance(answer, Critique):
        return float(answer.overall)
    if isinstance(answer, Fault):
        return answer
    return Fault("invalid", f"the critic gave a {type(answer).__name__} for the edit; expected a Critique", str(answer))


def _joined(
    item: ToScore,
    places: Mapping[str, int],
    filtered: Mapping[str, Sequence[float | Fault]],
    judged: Sequence[float] | None,
    similarity: float | None,
) -> Scores | Fault:
    """What belongs to one item; its images are at `places`."""
    scores: dict[str, dict[str, float]] = {}
    for kind, place in places.items():
        own = {name: found[place] for name, found in filtered.items()}
        if fault := next((one for one in own.values() if isinstance(one, Fault)), None):
            return fault
        scores[kind] = cast("dict[str, float]", own)
    evaluation = {kind: judged[place] for kind, place in places.items()} if judged is not None else {}
    if item.edit is None:
        return Scores(scores["source"], None, None, None, evaluation)
    if similarity is not None and not math.isfinite(similarity):
        return Fault("invalid", f"the similarity of source and edit is {similarity}; expected a finite number")
    others = [scores[f"edit-{number}"] for number, _ in item.numbered]
    return Scores(scores["source"], scores["edit"], distance(item.source, item.edit), similarity, evaluation, others)


def check_filters(config: DecideConfig, evaluation: str, critic: str) -> None:
    """Refuse rewards that filter if one of them is the one that evaluates."""
    for name in config.rewards:
        if evaluation and _judge_of(name, critic) == _judge_of(evaluation, critic):
            raise InputError(
                f"the reward {name!r} filters, and {evaluation!r} evaluates, which is the same judge; expected two, or "
                "the evaluation only shows how well the filter was met; name another reward in decide.rewards or in "
                "evaluation"
            )


def filter_rewards(config: DecideConfig) -> dict[str, Reward]:
    """The rewards that filter, but for the critic."""
    return {name: load_reward(name) for name in config.rewards if name != CRITIC}


def is_verifier(reward: str) -> bool:
    """Whether a reward is the truth of the embedded world, and no model of it."""
    return _judge_of(reward, "") == _VERIFIER


def score_images(
    reward: Reward, images: Sequence[Image], captions: Sequence[str], *, name: str, device: str = "cpu"
) -> list[float]:
    """The scores of images of any sizes, each size asked at once."""
    scores = [0.0] * len(images)
    for size in dict.fromkeys(image.size for image in images):
        places = [place for place, image in enumerate(images) if image.size == size]
        batch = _tensor([images[place] for place in places]).to(device)
        values = score(reward, batch, [captions[place] for place in places], name=name)
        for place, value in zip(places, values.tolist(), strict=True):
            scores[place] = value
    return scores


def distance(first: Image, second: Image) -> float:
    """Mean absolute difference of the pixels of two images of one size, in [0, 1].

    Example:
        >>> from PIL import Image
        >>> distance(Image.new("RGB", (4, 4), (0, 0, 0)), Image.new("RGB", (4, 4), (255, 255, 255)))
        1.0
    """
    one, other = (np.asarray(image, np.float64) for image in (first, second))
    return float(np.abs(one - other).mean() / 255)


def _judge_of(name: str, critic: str) -> str:
    if name == CRITIC:
        return _VERIFIER if critic == "shapes" else f"the critic {critic}"  # it sees with the verifier's eyes
    name = name_of(name).removeprefix("http:")  # wherever it is served
    if name in CHECKPOINTS:
        name = f"{name}:{CHECKPOINTS[name]}"  # of one judge under two names
    place = REWARDS.get(name, name)
    return _VERIFIER if place.startswith(_VERIFIER) else place


def _tensor(images: Sequence[Image]) -> torch.Tensor:
    pixels = np.stack([np.asarray(image, np.uint8) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
