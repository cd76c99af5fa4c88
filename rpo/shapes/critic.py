"""The critic of the shapes world: it sees with the verifier's eyes and speaks in plain words.

`overall` is the verifier's mark, 10 exactly if the prompt holds, which is when there is nothing to fix.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
from PIL.Image import Image

from rpo.curation.curate_config import ChatConfig
from rpo.curation.records import Critique, Problem
from rpo.curation.vlm.answers import AnswerCache
from rpo.data.pixels import rgb
from rpo.errors import InputError
from rpo.shapes import verifier
from rpo.shapes.prompts import ObjectType, Prompt, parse_prompt
from rpo.shapes.world import IMAGE_SIZE

SEVERITY: dict[verifier.ProblemKind, int] = {
    "unreadable": 3,
    "missing": 3,
    "count": 3,
    "wrong_color": 2,
    "wrong_shape": 2,
    "relation": 2,
    "extra": 1,
}
"""What the caption names and the image lacks weighs most; what is beside it, least."""

_MOST_PROBLEMS = 20  # of a critique; an image of confetti has more


class ShapesCritic:
    """Reads the scene and compares it with its prompt.

    Example:
        >>> from PIL import Image
        >>> from rpo.shapes.world import Scene, SceneObject, render
        >>> image = Image.fromarray(render(Scene((SceneObject("circle", "red", 32, 12, 9),))))
        >>> ShapesCritic()([image], ["a blue circle"])[0].problems[0].what
        'wrong colour: a blue circle wanted, a red circle seen'
    """

    identity: Mapping[str, str] = MappingProxyType({"kind": "shapes"})
    batch_size: int = 16
    concurrency: int = 1

    def __call__(self, images: Sequence[Image], captions: Sequence[str]) -> list[Critique]:
        """One critique per image."""
        return [_criticise(image, parse_prompt(caption)) for image, caption in zip(images, captions, strict=True)]


def shapes_critic(config: ChatConfig, answers: AnswerCache) -> ShapesCritic:
    """The critic of the shapes world, which has nothing to set and nothing to keep."""
    return ShapesCritic()


def pixels_of(image: Image) -> np.ndarray:
    """The pixels of an image of the shapes world."""
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        raise InputError(
            f"got an image of {image.width} x {image.height}; the shapes world has {IMAGE_SIZE} x {IMAGE_SIZE}; use a "
            "critic for photographs"
        )
    return np.asarray(rgb(image))


def _criticise(image: Image, prompt: Prompt) -> Critique:
    scene = verifier.read_scene(pixels_of(image))
    verdict = verifier.judge(scene, prompt)
    problems = [Problem(what=one.what, where=_place(one.at), severity=SEVERITY[one.kind]) for one in verdict.problems]
    problems.sort(key=lambda problem: -problem.severity)
    return Critique(
        problems=tuple(problems[:_MOST_PROBLEMS]),
        keep=_what_is_right(scene, prompt, verdict),
        overall=verifier.mark_of(verdict),
    )


def _place(at: tuple[float, float] | None) -> str:
    """A place in words and in pixels: "upper left (x 12, y 9)"."""
    if at is None:
        return ""
    x, y = at
    row = ("upper", "middle", "lower")[min(int(3 * y / IMAGE_SIZE), 2)]
    column = ("left", "middle", "right")[min(int(3 * x / IMAGE_SIZE), 2)]
    name = "centre" if row == column == "middle" else " ".join(dict.fromkeys((row, column)))
    return f"{name} (x {x:.0f}, y {y:.0f})"


def _what_is_right(scene: verifier.ReadScene, prompt: Prompt, verdict: verifier.Verdict) -> tuple[str, ...]:
    """The wanted objects that are there, with their relation if it holds, and a readable background."""
    seen = Counter(ObjectType(item.color, item.shape) for item in scene.objects if item.color and item.shape)
    right = [str(named) for named in (Counter(prompt.wanted) & seen).elements()]
    kept = [f"the {name}" for name in right]
    has_both = prompt.relation is not None and len(right) == len(prompt.objects)
    if has_both and not any(problem.kind == "relation" for problem in verdict.problems):
        kept = [f"the {prompt.objects[0]} {prompt.relation} the {prompt.objects[1]}"]
    return (*kept, "the plain background") if scene.has_background else ()
