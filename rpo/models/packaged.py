"""Checkpoints that come with the package, by the name that stands for their folder."""

from os import PathLike

from rpo.plugins import plugged

PACKAGED = {"shapes": "rpo.shapes:path"}
"""What gives the folder of each."""


def folder_of(source: str | PathLike[str]) -> str | PathLike[str]:
    """The folder of a packaged checkpoint; any other source as it is."""
    return plugged(PACKAGED, source)() if isinstance(source, str) and source in PACKAGED else source
