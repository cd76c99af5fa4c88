"""From the kind that a configuration names to the critic, instructor, judge or editor."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rpo.curation.curate_config import ChatConfig, EditorConfig
from rpo.curation.records import Critic, Editor, Instructor, Unavailable
from rpo.curation.vlm.answers import AnswerCache
from rpo.errors import SURROUNDINGS, InputError
from rpo.plugins import load_plugin

CRITICS = {
    "shapes": "rpo.shapes.critic:shapes_critic",
    "server": "rpo.curation.vlm.critic:vlm_critic",
    "local": "rpo.curation.vlm.critic:vlm_critic",
    "nothing": "rpo.curation.nothing:nothing_to_fix",
}
INSTRUCTORS = {
    "shapes": "rpo.shapes.instructor:shapes_instructor",
    "shapes-caption": "rpo.shapes.instructor:shapes_caption_instructor",
    "server": "rpo.curation.vlm.instructor:vlm_instructor",
    "local": "rpo.curation.vlm.instructor:vlm_instructor",
}
JUDGES = {
    "shapes": "rpo.curation.judge:reward_judge",
    "reward": "rpo.curation.judge:reward_judge",
    "server": "rpo.curation.judge:vlm_judge",
    "local": "rpo.curation.judge:vlm_judge",
}
"""What makes those of the package: each is called with the configuration and where answers are kept."""

EDITORS = {
    "shapes": "rpo.shapes.editor:shapes_editor",
    **dict.fromkeys(
        ("instruct_pix2pix", "controlnet", "kontext", "flux2_klein", "qwen_edit"),
        "rpo.curation.editors.families:family_editor",
    ),
}
"""What makes the editors of the package: it is called with the configuration."""


def load_critic(config: ChatConfig, answers: AnswerCache | None = None) -> Critic:
    """Make the critic that a configuration describes; one of your own is called with the configuration alone."""
    return make_component(config, CRITICS, "critic", answers or AnswerCache(None))


def load_instructor(config: ChatConfig, answers: AnswerCache | None = None) -> Instructor:
    """Make the instructor that a configuration describes; one of your own is called with the configuration alone."""
    return make_component(config, INSTRUCTORS, "instructor", answers or AnswerCache(None))


def load_editor(config: EditorConfig) -> Editor:
    """Make the editor that a configuration describes; one of your own is called with the configuration, too."""
    return make_component(config, EDITORS, "editor")


def make_component(config: Any, known: Mapping[str, str], what: str, *for_known: object) -> Any:
    """Make the component that a configuration describes.

    Args:
        config: What the component is made of. Its `kind` is a name among `known`, or "package.module:attribute"; its
            `model` is for messages.
        for_known: What the package's own are called with besides the configuration; one of your own is not.
    """
    make = find_component(config.kind, known, what)
    try:
        return make(config, *for_known) if config.kind in known else make(config)
    except (InputError, Unavailable):
        raise  # these say what is wrong
    except Exception as error:
        if isinstance(error, OSError) and error.errno in SURROUNDINGS:
            raise  # no fault of the component
        named = f"kind {config.kind!r}" + (f" and model {config.model!r}" if config.model else "")
        raise InputError(
            f"the {what} of {named} cannot be made ({type(error).__name__}: {error}); expected one that "
            "its configuration is enough for; look at its settings and whether its files are whole"
        ) from error


def find_component(kind: str, known: Mapping[str, str], what: str) -> Callable[..., Any]:
    """What makes a component of that kind."""
    found = load_plugin(kind, known, f"{what} of kind")
    if not callable(found):
        raise InputError(
            f"{what} {kind!r} is of type {type(found).__name__}; expected a class or function that takes the "
            "configuration; name that"
        )
    return found


def hash_of_files(folder: Path) -> str:
    """One sha256 of all files of a folder, which tells one version of a model from another."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as handle:
            content = hashlib.file_digest(handle, "sha256").hexdigest()
        digest.update(f"{file.relative_to(folder)}\0{content}\n".encode())
    return digest.hexdigest()
