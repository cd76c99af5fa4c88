"""What others will see names no folder of this machine: a path is called by its last name.

Paths come into files by many ways: settings, what diffusers notes in every part of a pipeline, messages. Those that are
whole values are found by how they begin, those within a sentence as well.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rpo.errors import InputError
from rpo.files.text import read_text, write_text
from rpo.from_environment import replaced

_BEGINNING = r"(?:file:/{0,2})?(?:~[\w.-]*[/\\]|[A-Za-z]:[\\/]|[/\\]|\.\.[/\\])"
_WHOLE = re.compile(_BEGINNING + r"[^\n]*")
_NAME = r"[^\s\"'`<>|;,()\[\]{}/\\:]+"
_WITHIN = re.compile(rf"(?<![\w./\\<-])(?!//){_BEGINNING}(?:{_NAME}[/\\]+)+(?:{_NAME})?")
_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\]")

_CONFIGS = ("model_index.json", "config.json", "*_config.json")
_TEXTS = (".json", ".jsonl", ".yaml", ".yml", ".md", ".txt", ".csv", ".toml", ".html")
_SECRETS = ("OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "RPO_REWARD_TOKEN")
_HOMES = re.compile(rb"/(?:home|Users)/[\w.-]+/|(?<![\w.-])/root/|[A-Za-z]:(?:\\\\?|/)Users(?:\\\\?|/)")
_SHORTEST = 6
"""Characters of what is looked for; a shorter one is in many files by chance."""


def shown_path(text: str) -> str:
    """A text in which every path of this machine is its last name; of one in the Hub's cache, the id.

    Example:
        >>> shown_path("/home/alice/client-x/pairs"), shown_path("see /home/alice/pairs for more"), shown_path("a/b")
        ('pairs', 'see pairs for more', 'a/b')
    """
    if _WHOLE.fullmatch(text):
        return _last_name(text)
    return _WITHIN.sub(lambda found: _last_name(found[0]), text)


def without_userinfo(text: str) -> str:
    """A text with addresses, without what stands before their "@"."""
    return re.sub(r"//[^/?#\s]*@", "//", text)


def without_paths(value: Any) -> Any:
    """Plain data (what JSON can hold, and paths) in which every path is its last name."""
    if isinstance(value, Mapping):
        return {without_paths(name): without_paths(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(without_paths(one) for one in value)
    return shown_path(str(value)) if isinstance(value, str | Path) else value


def clean_configs(folder: Path) -> None:
    """Take the paths out of the configuration files of a saved pipeline and of its parts."""
    for path in sorted({path for pattern in _CONFIGS for path in folder.rglob(pattern)}):
        found = json.loads(read_text(path))
        # Only texts that are paths and nothing else: a vocabulary must stay as it is.
        clean = replaced(found, lambda one: _last_name(one) if isinstance(one, str) and _WHOLE.fullmatch(one) else one)
        if clean != found:
            write_text(path, json.dumps(clean, indent=2, ensure_ascii=False) + "\n")


def refuse_private(folder: Path, names: Sequence[str]) -> None:
    """Refuse to publish files with paths of this machine or keys of this environment in them."""
    places = [str(Path.home()), str(folder.resolve().parent), os.getcwd()]
    wanted = {f"{place}/".encode(): "a path of this machine" for place in places if place.count("/") > 1}
    wanted |= {
        os.environ[name].encode(): f"the value of {name}"
        for name in _SECRETS
        if len(os.environ.get(name, "")) >= _SHORTEST
    }
    found: dict[str, str] = {}
    for name in names:
        for line in _lines(folder / name):
            hits = [what for needle, what in wanted.items() if needle in line]
            hits += ["a path of somebody's home"] if _HOMES.search(line) else []
            if hits:
                found[name] = hits[0]
                break
    if found:
        listed = ", ".join(f"{name} ({what})" for name, what in found.items())
        raise InputError(
            f"{folder} holds what is nobody else's business: {listed}; expected files without paths and keys; save the "
            "model again with this version of rpo, or take them out"
        )


def _lines(path: Path) -> Iterator[bytes]:
    """What can be read of a file as text: its lines, or the header of its tensors."""
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            yield file.read(int.from_bytes(file.read(8), "little"))
        elif path.suffix in _TEXTS:
            yield from file


def _last_name(path: str) -> str:
    if found := _SNAPSHOT.search(path):
        return f"{found[1]}/{found[2]}"
    names = [name for name in re.split(r"[/\\]", path) if name not in ("", ".", "..", "~", "file:")]
    return names[-1] if names else path
