"""Where an image of the shapes world is at fault: the boxes of what the verifier finds wrong, in pixels.

Too much or wrong is the box of an object; of too many alike, that of the last one. Where something is missing the box
is all of the image but the boxes of the objects that are right: there is where it can appear.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray
from torch import Tensor

from rpo.data.pixels import to_pixels
from rpo.shapes import verifier
from rpo.shapes.prompts import Prompt, parse_prompt
from rpo.shapes.reader import ReadObject
from rpo.shapes.world import IMAGE_SIZE
from rpo.types import Images

REACH = 0.8
"""Half the side of a box, in roots of the object's area; 0.76 of a triangle, which reaches furthest."""

MARGIN = 2.0
"""Pixels of a box around its object, which is blurred at its edge."""


def faults_of(images: Images, prompts: Sequence[str]) -> Bool[Tensor, "images height width"]:
    """The pixels at fault of each image; none of one that is right."""
    found = [_faults(pixels, parse_prompt(text)) for pixels, text in zip(to_pixels(images), prompts, strict=True)]
    return torch.from_numpy(np.stack(found))


def _faults(pixels: NDArray[np.uint8], prompt: Prompt) -> NDArray[np.bool_]:
    scene = verifier.read_scene(pixels)
    problems = verifier.judge(scene, prompt).problems
    named = {one.at for one in problems if one.at is not None}
    wrong = [item for item in scene.objects if (item.x, item.y) in named]
    right = [item for item in scene.objects if item not in wrong]
    is_lacking = any(one.kind in ("missing", "unreadable") for one in problems)
    if any(one.kind == "count" for one in problems):
        alike = [
            item for item in right if (item.color, item.shape) == (prompt.objects[0].color, prompt.objects[0].shape)
        ]
        wrong += alike[prompt.count :]
        is_lacking = is_lacking or len(alike) < prompt.count
    boxes = np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
    for item in right if is_lacking else wrong:
        boxes |= _box(item)
    return ~boxes if is_lacking else boxes


def _box(item: ReadObject) -> NDArray[np.bool_]:
    half = REACH * np.sqrt(item.area) + MARGIN
    rows, columns = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    return (abs(rows - item.y) <= half) & (abs(columns - item.x) <= half)
