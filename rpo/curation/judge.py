"""Pairwise judges: which of two images fits their caption better, asked in both orders.

A judge that is shown the same pair the other way round and changes its mind has told where an image stood and not which
is better. So both orders are always asked; answers that disagree are a fault that says both, and no tie.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, final

import numpy as np
import torch
from PIL.Image import Image
from pydantic import BaseModel, ConfigDict, StringConstraints

from rpo.curation.components import JUDGES, make_component
from rpo.curation.curate_config import ChatConfig
from rpo.curation.records import Fault, Judge, Verdict
from rpo.curation.vlm.answers import AnswerCache
from rpo.curation.vlm.asking import Asking, load_chat
from rpo.curation.vlm.prompts import PromptFile
from rpo.data.pixels import rgb
from rpo.errors import InputError
from rpo.rewards import Reward, load_reward, score

_MIRRORED: dict[Verdict, Verdict] = {"first": "second", "second": "first", "tie": "tie"}


class JudgeAnswer(BaseModel):
    """What a model says of two images; the reason comes first, so that it is there before the winner is written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reason: Annotated[str, StringConstraints(max_length=1000)]
    winner: Verdict


@dataclass(frozen=True)
class OrderedVerdicts:
    """What a judge says of one pair in both orders; both verdicts are about the images, not about the places."""

    forward: Verdict | Fault
    """With the first image first."""
    backward: Verdict | Fault
    """With the second image first; "first" is still the first image of the pair."""

    @property
    def is_consistent(self) -> bool:
        """Whether both answers say the same."""
        return not isinstance(self.forward, Fault) and self.forward == self.backward

    @property
    def verdict(self) -> Verdict | Fault:
        """The verdict, if both orders agree in one; otherwise why there is none."""
        for answer in (self.forward, self.backward):
            if isinstance(answer, Fault):
                return answer
        if self.is_consistent:
            return self.forward
        said = f"{self.forward} is better in this order, {self.backward} in the other"
        return Fault("invalid", f"the verdict depends on the order of the images: {said}", raw=said)


class BothOrders:
    """A judge that asks another one twice, and believes it where both answers agree."""

    identity: Mapping[str, str]
    batch_size: int
    concurrency: int

    def __init__(self, judge: Judge) -> None:
        """Ask `judge`."""
        self._judge = judge
        self.identity = {**judge.identity, "orders": "both"}
        self.batch_size, self.concurrency = judge.batch_size, judge.concurrency

    def __call__(
        self, first_images: Sequence[Image], second_images: Sequence[Image], captions: Sequence[str]
    ) -> list[Verdict | Fault]:
        """One verdict per pair; a fault where the orders disagree."""
        return [one.verdict for one in self.orders(first_images, second_images, captions)]

    def orders(
        self, first_images: Sequence[Image], second_images: Sequence[Image], captions: Sequence[str]
    ) -> list[OrderedVerdicts]:
        """What is said in each order."""
        forward = self._judge(first_images, second_images, captions)
        backward = self._judge(second_images, first_images, captions)
        turned: list[Verdict | Fault] = [one if isinstance(one, Fault) else _MIRRORED[one] for one in backward]
        return [OrderedVerdicts(*answers) for answers in zip(forward, turned, strict=True)]


@final
class VlmJudge(Asking):
    """Asks a model, which sees both images and the caption, once, in the order given."""

    def __call__(
        self, first_images: Sequence[Image], second_images: Sequence[Image], captions: Sequence[str]
    ) -> list[Verdict | Fault]:
        """One verdict per pair."""
        pairs = list(zip(first_images, second_images, strict=True))
        answers = self._ask(pairs, [{"caption": caption} for caption in captions], JudgeAnswer)
        return [answer if isinstance(answer, Fault) else answer.winner for answer in answers]


class RewardJudge:
    """Any reward as a judge: the higher score wins, and a gap of at most `margin` is a tie."""

    batch_size: int = 16
    concurrency: int = 1

    def __init__(self, reward: Reward, *, name: str, margin: float = 0.0) -> None:
        """Compare scores."""
        self._reward, self._name, self._margin = reward, name, margin
        self.identity: Mapping[str, str] = MappingProxyType({"kind": "reward", "model": name, "margin": str(margin)})

    def __call__(
        self, first_images: Sequence[Image], second_images: Sequence[Image], captions: Sequence[str]
    ) -> list[Verdict | Fault]:
        """One verdict per pair."""
        gaps = [
            self._score(first, caption) - self._score(second, caption)
            for first, second, caption in zip(first_images, second_images, captions, strict=True)
        ]
        return ["tie" if abs(gap) <= self._margin else "first" if gap > 0 else "second" for gap in gaps]

    def _score(self, image: Image, caption: str) -> float:
        pixels = torch.from_numpy(np.array(rgb(image))).permute(2, 0, 1)[None] / 255
        return score(self._reward, pixels, [caption], name=self._name).item()


def load_judge(config: ChatConfig, answers: AnswerCache | None = None) -> BothOrders:
    """Make the judge that a configuration describes, which asks both orders.

    Args:
        config: Kind, model, address, prompt and decoding; one of your own is called with it alone.
    """
    return BothOrders(make_component(config, JUDGES, "judge", answers or AnswerCache(None)))


def vlm_judge(config: ChatConfig, answers: AnswerCache) -> VlmJudge:
    """The judge behind a server or on this machine, as the configuration's kind says."""
    prompt = PromptFile.load("judge", config.prompt, variables=("caption",))
    return VlmJudge(load_chat(config, answers), prompt)


def reward_judge(config: ChatConfig, answers: AnswerCache) -> RewardJudge:
    """The reward that `model` names, or the verifier of the shapes world, as a judge."""
    name = "shapes" if config.kind == "shapes" else config.model
    if not name:
        raise InputError("the judge is a reward, but model is empty; give the name of a reward, such as shapes")
    return RewardJudge(load_reward(name), name=name)
