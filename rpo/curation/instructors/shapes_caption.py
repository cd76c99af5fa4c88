"""Instructions from the caption alone, blind to image and critique: what a critique must be better than.

"two red circles" becomes "add a red circle; add a red circle", and a relation "move the red circle above the blue
square": what a person would say who knows the wish and has not looked.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from PIL.Image import Image

from rpo.curation.component_config import InstructorConfig
from rpo.curation.records import Critique, Instructions
from rpo.shapes.edits import MAX_EDITS, add, move
from rpo.shapes.prompts import parse_prompt


class ShapesCaptionInstructor:
    """Writes instructions for the shapes editor without looking."""

    identity: Mapping[str, str] = MappingProxyType({"kind": "shapes-caption"})
    batch_size: int = 16
    concurrency: int = 1

    def __call__(
        self, images: Sequence[Image], captions: Sequence[str], critiques: Sequence[Critique]
    ) -> list[Instructions]:
        """Instructions for each image."""
        return [Instructions(instructions=_instruct(caption)) for caption in captions]


def shapes_caption_instructor(config: InstructorConfig, cache_folder: Path | None) -> ShapesCaptionInstructor:
    """The blind instructor, which has nothing to set and nothing to keep."""
    return ShapesCaptionInstructor()


def _instruct(caption: str) -> tuple[str, ...]:
    prompt = parse_prompt(caption)
    if prompt.relation:
        first, second = prompt.objects
        return (move(first, prompt.relation, second).text,)
    return tuple(add(named).text for named in prompt.wanted[:MAX_EDITS])
