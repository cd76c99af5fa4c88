"""Say whether an image shows what its prompt asks for, how nearly, and what is wrong.

score = (credit of the wanted objects + 1 if the relation holds) / (max(objects wanted, objects seen) + 1 if a relation)

An object seen earns 1 if colour and shape are right and `PARTIAL_CREDIT` if only one of them is. What is seen beyond
the wanted objects enlarges the denominator, and a relation is judged only between two right objects, so an image earns
nothing by showing more, nor by showing nothing. A prompt holds exactly if nothing is wrong, which is a score of 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rpo.errors import InputError
from rpo.shapes.prompts import NUMBER_WORDS, RELATIONS, ObjectType, Prompt, Relation, parse_prompt
from rpo.shapes.reader import ReadObject, ReadScene, read_scene
from rpo.shapes.world import DIRECTIONS, IMAGE_SIZE
from rpo.types import Images

__all__ = ["Mismatch", "ReadObject", "ReadScene", "Verdict", "judge", "mark_of", "read_scene", "verify", "verify_all"]

PARTIAL_CREDIT = 0.3
"""For an object with only the right colour or the right shape; below one half, so that two of them never outweigh a
right one."""

MIN_SEPARATION = 10
"""Pixels between two centres along the axis of a relation that holds; the world's own scenes keep 14."""

RANGE_TOLERANCE = 1e-3
"""How far a float image may leave [0, 1] by rounding."""

ProblemKind = Literal["unreadable", "missing", "extra", "wrong_color", "wrong_shape", "count", "relation"]


@dataclass(frozen=True)
class Mismatch:
    """One thing that keeps a prompt from holding."""

    kind: ProblemKind
    what: str
    """In plain words: "missing: a blue square"."""
    at: tuple[float, float] | None = None
    """Position (x, y) in pixels of the object at fault, if there is one."""


@dataclass(frozen=True)
class Verdict:
    """What the verifier thinks of an image: `holds` exactly if there are no problems, exactly if `score` is 1."""

    holds: bool
    score: float
    """From 0 to 1, for ordering images of one prompt."""
    reason: str
    """All problems in plain words, or what was seen if the prompt holds."""
    problems: tuple[Mismatch, ...]


def verify(image: NDArray[np.uint8] | Tensor, prompt: Prompt | str) -> Verdict:
    """Judge one image.

    Args:
        image: Pixels as uint8 [64, 64, 3], or a float tensor [3, 64, 64] in [0, 1] as a pipeline makes them.

    Example:
        >>> from rpo.shapes.world import Scene, SceneObject, render
        >>> image = render(Scene((SceneObject("circle", "red", 32, 32, 9),)))
        >>> verify(image, "a red circle").holds
        True
        >>> verify(image, "a red circle and a blue square").reason
        'missing: a blue square'
    """
    pixels = _tensor_to_pixels(image) if isinstance(image, Tensor) else _checked_pixels(image)
    return judge(read_scene(pixels), parse_prompt(prompt) if isinstance(prompt, str) else prompt)


def verify_all(images: Images, prompts: Sequence[Prompt | str]) -> list[Verdict]:
    """Judge a batch of images, each against its own prompt."""
    if len(images) != len(prompts):
        raise InputError(
            f"got {len(images)} images and {len(prompts)} prompts, but every image needs its own prompt; "
            "repeat each prompt once per image"
        )
    verdicts: list[Verdict] = []
    for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        try:
            verdicts.append(verify(image, prompt))
        except ValueError as error:
            raise InputError(f"image {index}: {error}") from error
    return verdicts


def judge(scene: ReadScene, prompt: Prompt) -> Verdict:
    """Compare what was seen with what the prompt wants."""
    if not scene.has_background:
        problem = Mismatch("unreadable", "unreadable: there is no light, even background to tell objects from")
        return Verdict(False, 0.0, problem.what, (problem,))
    matches, extras = _match(prompt.wanted, scene.objects)
    problems = _object_problems(prompt, matches, extras)
    earned = sum(_credit(want, seen) for want, seen in matches if seen)
    possible = max(len(prompt.wanted), len(scene.objects))
    if prompt.relation:
        possible += 1
        if earned == len(matches):
            wrong_relation = _relation_problem(prompt.relation, *(seen for _, seen in matches if seen))
            earned += not wrong_relation
            problems += wrong_relation
    reason = "; ".join(problem.what for problem in problems) or f"shows {prompt.text}"
    return Verdict(not problems, earned / possible, reason, tuple(problems))


def mark_of(verdict: Verdict) -> int:
    """What the critic of shapes thinks of an image: 1 + ⌊9 · score⌋, which is 10 exactly if the prompt holds."""
    return 1 + math.floor(9 * verdict.score)


def _match(
    wanted: Sequence[ObjectType], seen: Sequence[ReadObject]
) -> tuple[list[tuple[ObjectType, ReadObject | None]], list[ReadObject]]:
    """Give every wanted object the seen one that earns the most in all, or None; and what is left over."""
    credit = np.array([_credit(want, item) for want in wanted for item in seen]).reshape(len(wanted), len(seen))
    chosen = {row: column for row, column in zip(*linear_sum_assignment(credit, maximize=True), strict=True)}
    chosen = {row: column for row, column in chosen.items() if credit[row, column] > 0}
    matches = [(want, seen[chosen[row]] if row in chosen else None) for row, want in enumerate(wanted)]
    return matches, [item for column, item in enumerate(seen) if column not in chosen.values()]


def _credit(want: ObjectType, seen: ReadObject) -> float:
    is_right_color, is_right_shape = seen.color == want.color, seen.shape == want.shape
    if is_right_color and is_right_shape:
        return 1.0
    return PARTIAL_CREDIT if is_right_color or is_right_shape else 0.0


def _object_problems(
    prompt: Prompt, matches: Sequence[tuple[ObjectType, ReadObject | None]], extras: Sequence[ReadObject]
) -> list[Mismatch]:
    """What is wrong with the objects; for a counting prompt, too many and too few are one problem with both numbers."""
    problems: list[Mismatch] = []
    extras_of_other_kinds = list(extras)
    missing = [want for want, seen in matches if seen is None]
    if prompt.kind == "count":
        (named,) = prompt.objects
        surplus = [item for item in extras if _credit(named, item) == 1]
        extras_of_other_kinds = [item for item in extras if item not in surplus]
        right = len(surplus) + sum(1 for want, seen in matches if seen and _credit(want, seen) == 1)
        if right != prompt.count:
            number = {0: "none", 1: "one", **NUMBER_WORDS}.get(right, str(right))
            problems.append(Mismatch("count", f"{prompt.text} wanted, {number} seen"))
        missing = []
    problems += [Mismatch("missing", f"missing: a {want}") for want in missing]
    problems += [_mismatch(want, seen) for want, seen in matches if seen and _credit(want, seen) < 1]
    problems += [Mismatch("extra", f"extra object: a {item}", (item.x, item.y)) for item in extras_of_other_kinds]
    return problems


def _mismatch(want: ObjectType, seen: ReadObject) -> Mismatch:
    position = (seen.x, seen.y)
    if seen.color == want.color:
        return Mismatch("wrong_shape", f"wrong shape: a {want} wanted, a {seen} seen", position)
    return Mismatch("wrong_color", f"wrong colour: a {want} wanted, a {seen} seen", position)


def _relation_problem(relation: Relation, first: ReadObject, second: ReadObject) -> list[Mismatch]:
    """The problem with the relation of two right objects, if any."""
    true_relations = [name for name in RELATIONS if _is_related(name, first, second)]
    if relation in true_relations:
        return []
    place = true_relations[0] if true_relations else f"not clearly {relation}"
    return [Mismatch("relation", f"wrong relation: the {first} is {place} the {second}", (first.x, first.y))]


def _is_related(relation: Relation, first: ReadObject, second: ReadObject) -> bool:
    step_x, step_y = DIRECTIONS[relation]
    offset_x, offset_y = first.x - second.x, first.y - second.y
    along = step_x * offset_x + step_y * offset_y
    across = abs(step_y * offset_x) + abs(step_x * offset_y)
    return along >= MIN_SEPARATION and along > across


def _checked_pixels(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    expected = (IMAGE_SIZE, IMAGE_SIZE, 3)
    is_array = isinstance(image, np.ndarray)
    if not is_array or image.dtype != np.uint8 or image.shape != expected:
        given = f"an array of {image.dtype} {list(image.shape)}" if is_array else f"a {type(image).__name__}"
        raise InputError(
            f"got {given}, expected an array of uint8 {list(expected)}; "
            "give a rendered scene, or a float tensor [3, 64, 64] in [0, 1]"
        )
    return image


def _tensor_to_pixels(image: Tensor) -> NDArray[np.uint8]:
    expected = (3, IMAGE_SIZE, IMAGE_SIZE)
    if not image.is_floating_point() or image.shape != expected:
        raise InputError(
            f"got a tensor of {image.dtype} {list(image.shape)}, expected float {list(expected)}; "
            "give one image at a time in [0, 1], or a batch to verify_all"
        )
    values = image.detach().to("cpu", torch.float32)
    low, high = values.min().item(), values.max().item()
    if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
        raise InputError(
            f"got image values from {low:g} to {high:g}, expected [0, 1]; divide by 255, or map [-1, 1] by x / 2 + 0.5"
        )
    return (values.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
