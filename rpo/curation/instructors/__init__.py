"""Instructors: what turns a critique into instructions for an editor, and how a configuration becomes one."""

from pathlib import Path

from rpo.curation.component_config import InstructorConfig
from rpo.curation.components import make_component
from rpo.curation.records import Instructor

__all__ = ["INSTRUCTORS", "InstructorConfig", "load_instructor"]

INSTRUCTORS = {
    "shapes": "rpo.curation.instructors.shapes:shapes_instructor",
    "shapes-caption": "rpo.curation.instructors.shapes_caption:shapes_caption_instructor",
    "server": "rpo.curation.instructors.vlm:vlm_instructor",
    "local": "rpo.curation.instructors.vlm:vlm_instructor",
}
"""The instructors that come with the package: each is called with the configuration and the folder of the cache."""


def load_instructor(config: InstructorConfig, cache_folder: Path | None = None) -> Instructor:
    """Make the instructor that a configuration describes; one of your own is called with the configuration alone."""
    return make_component(config, INSTRUCTORS, "instructor", cache_folder)
