"""`rpo reproduce`: a run once more, from what its folder says, and whether the same weights come of it.

Before it begins it is said what is different now: code, versions, machine, and what it learns from. On a CPU equal
things give equal bytes; a GPU, and a server that is asked, may give others.
"""

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from rpo.config.load import load_config
from rpo.errors import InputError
from rpo.files.whole import read_lines
from rpo.runs import train_config
from rpo.runs.align import ROUNDS, align
from rpo.runs.align_config import AlignConfig
from rpo.runs.settings import SETTINGS
from rpo.runs.train import RUN
from rpo.runs.train import run as train
from rpo.training.made_with import MadeWith, read_made_with

RESULTS = ("lora", "pipeline")
"""Where in a run's folder what it trained is."""


@dataclass(frozen=True)
class Reproduced:
    """What came of it."""

    folder: Path
    """Of the second run."""
    different: Mapping[str, str]
    """What the runs were made with, where it differs, by name."""
    unequal: Mapping[str, str]
    """The files of weights that differ, and how much."""


def compare(folder: Path) -> dict[str, str]:
    """What would be different in a second run of what is in a folder; nothing is run.

    Raises `InputError` if the folder does not say how it was made, or what it names is not there any more.
    """
    found: list[dict[str, str]] = []

    def stop(now: MadeWith) -> None:
        found.append(read_made_with(folder).differences(now))
        raise _StopHere

    with tempfile.TemporaryDirectory() as place, suppress(_StopHere):
        _again(folder, Path(place, "run"), stop)
    return found[0]


def reproduce(
    folder: Path, output: Path | None = None, *, tell: Callable[[Mapping[str, str]], None] = lambda different: None
) -> Reproduced:
    """Run again what a folder holds.

    Args:
        folder: Of a run that is finished.
        output: A new folder; by default the same name with "-reproduced".
        tell: Called with what is different, before anything is trained.

    Raises `InputError` if there is no finished run, or the new folder holds one already.
    """
    output, different = output or folder.with_name(f"{folder.name}-reproduced"), dict[str, str]()
    before = _weights(folder)

    def differs(now: MadeWith) -> None:
        different.update(read_made_with(folder).differences(now))
        tell(different)

    _again(folder, output, differs)
    return Reproduced(output, different, _unequal(before, _weights(output)))


class _StopHere(Exception):  # noqa: N818 - no error: all that was to be known is known
    """Raised when a run would begin."""


def _again(folder: Path, output: Path, tell: Callable[[MadeWith], None]) -> None:
    """The run of a folder, in another one."""
    kind = read_made_with(folder).settings
    words = [f"output={output}"]
    if kind == AlignConfig.__name__:
        rounds = max((int(str(line["round"])) for line in read_lines(folder / ROUNDS)), default=0)
        words += [f"rounds={rounds}"] if rounds else []  # which may have been raised since
        align(load_config(AlignConfig, folder / SETTINGS, words), tell=tell)
        return
    known = {cls.__name__: cls for cls in vars(train_config).values() if isinstance(cls, type)}
    train(load_config(known[kind], folder / RUN, words), tell=tell)


def _weights(folder: Path) -> dict[str, Path]:
    found = {
        file.relative_to(folder).as_posix(): file
        for name in RESULTS
        for file in sorted((folder / name).rglob("*.safetensors"))
    }
    if not found:
        raise InputError(
            f"{folder} has no weights in {' or '.join(RESULTS)}; expected a run that is finished; continue it with "
            "--resume, or give another folder"
        )
    return found


def _unequal(before: Mapping[str, Path], after: Mapping[str, Path]) -> dict[str, str]:
    told: dict[str, str] = {}
    for name in dict.fromkeys([*before, *after]):
        if name not in before or name not in after:
            told[name] = f"only in the {'first' if name in before else 'second'} run"
        elif _sha256(before[name]) != _sha256(after[name]):
            told[name] = _distance(load_file(before[name]), load_file(after[name]))
    return told


def _distance(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    if before.keys() != after.keys() or any(before[name].shape != after[name].shape for name in before):
        return "other tensors"
    apart = max(float((before[name].double() - after[name].double()).abs().max()) for name in before)
    largest = max(float(one.abs().max()) for one in before.values())
    return f"by up to {apart:.3g}, of weights up to {largest:.3g}" if apart else "in its header alone"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
