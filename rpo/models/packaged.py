"""Checkpoints that come with the package, by the name that stands for their folder."""

from os import PathLike

from rpo.plugins import load_plugin

PACKAGED = {
    "shapes": "rpo.shapes:path",
    "shapes-editor": "rpo.shapes:editor_path",
    "shapes-tokens": "rpo.shapes:tokens_path",
    "words": "rpo.words:path",
}
"""What gives the folder of each."""


def folder_of(source: str | PathLike[str]) -> str | PathLike[str]:
    """The folder of a packaged checkpoint; any other source as it is."""
    return load_plugin(source, PACKAGED, "checkpoint")() if isinstance(source, str) and source in PACKAGED else source


def expression_of(source: str) -> str:
    """Python that gives the folder of a packaged checkpoint, such as `rpo.shapes.path()`; empty for any other."""
    module, _, attribute = PACKAGED.get(source, "").partition(":")
    return f"{module}.{attribute}()" if module else ""


def imports_of(source: str) -> tuple[str, ...]:
    """What that expression needs."""
    module = PACKAGED.get(source, "").partition(":")[0]
    return (f"import {module}",) if module else ()
