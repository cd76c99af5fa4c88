"""What a report says about how its run was set up: every setting, and the machine with its libraries."""

import platform
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
from omegaconf import OmegaConf

import rpo
from rpo.files.local_paths import without_paths

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate")

Facts = tuple[tuple[str, str], ...]
"""Names and values."""


def settings_facts(text: str) -> tuple[tuple[str, Facts], ...]:
    """The settings of a run, section by section; those that are nothing are left out.

    Returns:
        Title and facts of each section, those without a section first.
    """
    tree = without_paths(OmegaConf.to_container(OmegaConf.create(text)))
    return tuple((name, facts) for name, facts in _sections("Run", tree) if facts)


def _sections(name: str, tree: Any, prefix: str = "") -> Iterator[tuple[str, Facts]]:
    yield name, tuple((key, _text(value)) for key, value in tree.items() if _is_fact(value))
    for key, part in tree.items():
        if isinstance(part, dict):
            yield from _sections(f"{prefix}{key}", part, f"{prefix}{key}.")


def _is_fact(value: Any) -> bool:
    return not (value is None or isinstance(value, dict) or value == [])


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def environment_facts() -> Facts:
    """Device, Python and the libraries that matter."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    libraries = tuple((name, version(name)) for name in LIBRARIES)
    return (("device", device), ("python", platform.python_version()), ("rpo", rpo.__version__), *libraries)
