"""The settings that a run of several stages was started with, in its folder: whoever continues it must repeat them."""

import re
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rpo.config.load import differences, load_config, to_yaml
from rpo.errors import InputError
from rpo.files.text import read_text
from rpo.files.whole import write_whole
from rpo.from_environment import digests

SETTINGS = "settings.yaml"
_DIGEST = re.compile(r"^# (.*) sha256 (\w+)$", re.MULTILINE)  # of what came from the environment


def require_same_settings(folder: Path, config: Any, *, resume: bool, free: Collection[str]) -> None:
    """Refuse a folder that holds another run; nothing is written.

    Args:
        resume: Whether a run in the folder is to be continued.
    """
    file = folder / SETTINGS
    if not file.exists():
        return
    if not resume:
        raise InputError(f"{folder} holds a run already; give --resume to continue it, or --output for another folder")
    changed = differences(load_config(type(config), file), config)
    told = [f"{key} {change}" for key, change in changed.items() if key not in free]
    known = dict(_DIGEST.findall(read_text(file)))
    told += [
        f"{reference} has another value in the environment"
        for reference, digest in _digests(config, free).items()
        if known.get(reference, digest) != digest
    ]
    if told:
        raise InputError(
            f"{folder} was started with other settings ({file}): {'; '.join(told)}; repeat them, or give --output for "
            "another folder"
        )


def keep_settings(folder: Path, config: Any) -> None:
    """Write the settings of a run that begins, whole or not at all: a cut file would look like other settings."""
    if not (folder / SETTINGS).exists():
        digests = "".join(f"# {reference} sha256 {digest}\n" for reference, digest in _digests(config).items())
        write_whole(folder / SETTINGS, digests + to_yaml(config))


def _digests(config: Any, free: Collection[str] = ()) -> dict[str, str]:
    return digests({name: value for name, value in asdict(config).items() if name not in free})
