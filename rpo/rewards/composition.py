"""Whether an image shows the things that its prompt asks for: how many, of which colour, and where (arXiv:2310.11513).

score = mean over what is asked of how far it holds;   correct = all of it holds, as GenEval counts

What is asked stands in a prompt's metadata, in GenEval's form; a .jsonl file of prompts may be GenEval's own:

    {"prompt": "two red apples left of a bowl", "include": [{"class": "bowl", "count": 1},
     {"class": "apple", "count": 2, "color": "red", "position": ["left of", 0]}],
     "exclude": [{"class": "apple", "count": 3}]}

    presence    min(found, count) / count                  colour     share of the `count` surest that have it
    position    1 if each of them is there of each of       exclude    1 if fewer than `count` are found
                the things of the include at that place

A is left of B if the offset of their centres, less a tenth of their summed sizes, points left by more than half of the
offset. A colour is the one of ten whose texts CLIP finds most like the box. Colour and position are 0 where too few
were found. Differs from GenEval: its detector, Mask2Former, needs mmdet; here it is an open-vocabulary one, whose boxes
are not cut out before their colour is looked at, so that numbers cannot be compared with published ones.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, final

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from torch.nn import functional

from rpo.rewards.answers import RewardError
from rpo.rewards.base import check_batch, check_range
from rpo.rewards.clip import CLIP_SCORE, ClipReward
from rpo.rewards.detector import DETECTOR, Detector, Found, OpenVocabularyDetector, Thing
from rpo.rewards.version import version_of
from rpo.types import Images

Colour = Literal["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
COLOURS: tuple[Colour, ...] = Colour.__args__  # pyright: ignore[reportAttributeAccessIssue]
COLOUR_TEXTS = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
Relation = Literal["left of", "right of", "above", "below"]

FREE = 0.1
"""Of the summed sizes of two things, by which they may lie beside each other without being to one side."""

HALF = 0.5
NOWHERE = 1e-3
"""Pixels of offset that are none."""


class Include(BaseModel):
    """Things that have to be there."""

    model_config = ConfigDict(frozen=True)

    name: Annotated[str, Field(alias="class", min_length=1)]
    count: Annotated[int, Field(ge=1, strict=True)]
    color: Colour | None = None
    position: tuple[Relation, Annotated[int, Field(ge=0, strict=True)]] | None = None
    """In which relation to the things of the include at that place of the list."""


class Exclude(BaseModel):
    """Things of which there have to be fewer."""

    model_config = ConfigDict(frozen=True)

    name: Annotated[str, Field(alias="class", min_length=1)]
    count: Annotated[int, Field(ge=1, strict=True)]


class Composition(BaseModel):
    """What is asked of an image; what else is known of its prompt does not matter."""

    model_config = ConfigDict(frozen=True)

    include: Annotated[list[Include], Field(min_length=1)]
    exclude: list[Exclude] = []

    @property
    def names(self) -> list[str]:
        """Of all things, each once."""
        return list(dict.fromkeys(one.name for one in (*self.include, *self.exclude)))


@final
class CompositionReward:
    """How much of what is asked of an image holds.

    Example:
        >>> CompositionReward(OpenVocabularyDetector("my/owl"), ClipReward("my/clip"))
        CompositionReward(OpenVocabularyDetector('my/owl'), ClipReward('my/clip', scale=None))
    """

    is_differentiable = False

    def __init__(self, detector: Detector, clip: ClipReward) -> None:
        """Say what finds things, and what tells their colours."""
        self.detector, self.clip = detector, clip

    def __repr__(self) -> str:
        """What decides the score, as it would be written."""
        return f"CompositionReward({self.detector!r}, {self.clip!r})"

    def __call__(
        self, images: Images, prompts: Sequence[str], metadata: Sequence[Any]
    ) -> tuple[list[float], dict[str, list[float]]]:
        """The score of every image, and whether all of it holds.

        Raises:
            RewardError: A prompt does not say what is asked.
        """
        check_batch(images, prompts)
        check_range(images)
        asked = [self._asked(metadata, row) for row in range(len(prompts))]
        found = self.detector(images, [one.names for one in asked])
        every = [self._held(*one) for one in zip(images, asked, found, strict=True)]
        return [sum(one) / len(one) for one in every], {"correct": [float(min(one) == 1) for one in every]}

    def version(self) -> str:
        """Those of the detector and of the model that tells colours."""
        return f"{version_of(self.detector)}, {self.clip.version()}"

    def leave(self) -> None:
        """Have the models in the main memory until they are asked again."""
        self.detector.leave()
        self.clip.leave()

    def _asked(self, metadata: Sequence[Any], row: int) -> Composition:
        try:
            asked = Composition.model_validate(metadata[row])
            late = [one for place, one in enumerate(asked.include) if one.position and one.position[1] >= place]
        except ValidationError as error:
            fault = error.errors(include_url=False, include_input=False)[0]
            told = f"{'.'.join(map(str, fault['loc'])) or 'the whole'}: {fault['msg']}"
        else:
            if not late:
                return asked
            told = f"{late[0].name!r} is placed by an include that does not come before it"
        raise RewardError(
            f"the metadata of the prompt does not say what is asked ({told}); expected GenEval's form, with include: "
            '[{"class": "apple", "count": 1}]; reward such prompts only',
            indices=[row],
            batch_size=len(metadata),
        )

    def _held(self, image: Tensor, asked: Composition, found: Found) -> list[float]:
        """How far each thing that is asked holds, 0 to 1."""
        held, groups = list[float](), list[list[Thing] | None]()
        for one in asked.include:
            things = found[one.name][: one.count]
            own = [len(things) / one.count]
            if one.color is not None:
                enough = own[0] == 1
                colours = [self._colour(image, thing, one.name) for thing in things] if enough else []
                own.append(colours.count(one.color) / one.count)
            if one.position is not None:
                relation, place = one.position
                target = groups[place] if min(own) == 1 else None
                own.append(float(target is not None and _all(things, relation, target)))
            groups.append(things if min(own) == 1 else None)
            held += own
        return [*held, *(float(len(found[one.name]) < one.count) for one in asked.exclude)]

    @torch.no_grad()
    def _colour(self, image: Tensor, thing: Thing, name: str) -> Colour:
        """The colour whose texts are most like what is in the box."""
        height, width = image.shape[1:]
        left, top = (
            min(max(math.floor(edge), 0), side - 1) for edge, side in zip(thing.box, (width, height), strict=False)
        )
        right, bottom = max(math.ceil(thing.box[2]), left + 1), max(math.ceil(thing.box[3]), top + 1)
        seen = self.clip.embed_images(image[None, :, top:bottom, left:right])
        texts = [text.format(colour=colour, name=name) for colour in COLOURS for text in COLOUR_TEXTS]
        of_each = self.clip.embed_texts(texts, image.device).view(len(COLOURS), len(COLOUR_TEXTS), -1).mean(dim=1)
        return COLOURS[int((functional.normalize(of_each, dim=-1) @ seen[0]).argmax())]


def relations(one: Thing, other: Thing) -> set[Relation]:
    """Where one thing is of the other."""
    offset, free = list[float](), list[float]()
    for low, high in ((0, 2), (1, 3)):
        sizes = abs(one.box[high] - one.box[low]) + abs(other.box[high] - other.box[low])
        away = (one.box[low] + one.box[high] - other.box[low] - other.box[high]) / 2
        offset.append(away)
        free.append(math.copysign(max(abs(away) - FREE * sizes, 0), away))
    if max(map(abs, free)) < NOWHERE:
        return set()
    x, y = (part / math.hypot(*offset) for part in free)
    there: dict[Relation, bool] = {"left of": x < -HALF, "right of": x > HALF, "above": y < -HALF, "below": y > HALF}
    return {name for name, holds in there.items() if holds}


def _all(things: Sequence[Thing], relation: Relation, targets: Sequence[Thing]) -> bool:
    return all(relation in relations(thing, target) for thing in things for target in targets)


def composition(detector: str) -> CompositionReward:
    """With the OWLv2 or Grounding DINO of a folder or hub id; colours are told by the model of "clip-score"."""
    return CompositionReward(OpenVocabularyDetector(detector), CLIP_SCORE)


COMPOSITION = composition(DETECTOR)
