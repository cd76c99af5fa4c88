"""Checkpoints that are whole or absent: write beside, sync, rename.

A checkpoint `checkpoint-000100` is a folder of files with a manifest of their sizes and sha256. It is written under
another name and renamed when everything is on the disk, so a kill at any moment leaves the previous one; the oldest are
removed only after the new one is in place.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from rpo.errors import InputError
from rpo.files.text import read_text

MANIFEST = "manifest.json"
RUN = "run.json"
"""The part of a checkpoint that says what run it is of."""

Sealed = dict[str, dict[str, int | str]]
"""Size and sha256 of files."""

_NAME = re.compile(r"checkpoint-(\d{6,})")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=update_of)


def checkpoint_path(folder: Path, update: int) -> Path:
    """Where the checkpoint of an update lies, or would."""
    return folder / f"checkpoint-{update:06d}"


def begin_checkpoint(final: Path) -> Path:
    """An empty folder that becomes a checkpoint, for processes to write to before `save_checkpoint` ends it."""
    temporary = beside(final)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def save_checkpoint(final: Path, parts: Mapping[str, Any], *, keep: int, begun: Sealed | None = None) -> None:
    """Write one checkpoint, atomically, and drop the oldest beyond `keep`; one that is already there is left as it is.

    Args:
        parts: Content per file name: bytes as they are, `.json` as JSON, anything else by `torch.save`.
        begun: Files that are written already, where `begin_checkpoint` was called.
    """
    if final.exists():
        return
    with whole_or_absent(final):
        temporary = begin_checkpoint(final) if begun is None else beside(final)
        for name, part in parts.items():
            _write(temporary / name, part)
        _seal(temporary, begun or {})
        os.replace(temporary, final)
        _sync(final.parent)
    for old in checkpoints(final.parent)[:-keep]:
        doomed = beside(old)  # a kill half-way must not leave what looks like a checkpoint
        os.replace(old, doomed)
        shutil.rmtree(doomed)


@contextmanager
def whole_or_absent(final: Path) -> Iterator[None]:
    """What fails inside leaves nothing behind, and a disk that takes no more is told how to go on."""
    try:
        yield
    except OSError as error:
        shutil.rmtree(beside(final), ignore_errors=True)
        kept, free = checkpoints(final.parent), shutil.disk_usage(final.parent).free
        raise OSError(
            error.errno,
            f"could not save {final}: {error.strerror or error}; {free} bytes are free: make room, then resume from "
            f"{kept[-1].name if kept else 'the start, as there is no earlier checkpoint'}",
        ) from error
    except BaseException:
        shutil.rmtree(beside(final), ignore_errors=True)
        raise


def sealed(files: Iterable[Path], *, below: Path) -> Sealed:
    """Sizes and sums of files by their names below a folder, once they are on the disk."""
    found: Sealed = {}
    for file in files:
        _sync(file)
        found[file.relative_to(below).as_posix()] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    return found


def verify_checkpoint(path: Path, *, only: str | None = None) -> None:
    """Check every file of a checkpoint against its manifest."""
    if fault := fault_of(path, only=only):
        raise InputError(fault)


def fault_of(path: Path, *, only: str | None = None, share: tuple[int, int] = (0, 1)) -> str:
    """What is wrong with a checkpoint, and the remedy; nothing if all is well with this share of its files."""
    fault = _fault(path, only, share)
    return f"{fault}: {remedy_for(path)}" if fault else ""


def _fault(path: Path, only: str | None, share: tuple[int, int]) -> str:
    manifest = path / MANIFEST
    if not manifest.is_file():
        return f"{path} has no {MANIFEST}; expected a complete checkpoint"
    try:
        named: dict[str, dict[str, Any]] = json.loads(read_text(manifest))
        is_whole = bool(named) and all({"bytes", "sha256"} <= one.keys() for one in named.values())
    except (ValueError, AttributeError):
        is_whole = False
    if not is_whole:
        return f"{manifest} is damaged; expected the sizes and sha256 of the checkpoint's files"
    if only is not None and only not in named:
        return f"{manifest} does not name {only}; expected every file of a checkpoint"
    for name in sorted(named)[share[0] :: share[1]] if only is None else [only]:
        file, expected = path / name, named[name]
        if not file.is_file():
            fault = "is missing"
        elif file.stat().st_size != expected["bytes"]:
            fault = f"is truncated: it has {file.stat().st_size} bytes"
        elif _sha256(file) != expected["sha256"]:
            fault = "was altered"
        else:
            continue
        return f"{file} {fault}; expected {expected['bytes']} bytes, as its manifest names them"
    return ""


def remedy_for(path: Path) -> str:
    """How to go on without a checkpoint."""
    older = [other for other in checkpoints(path.parent) if update_of(other) < update_of(path)]
    return f"delete the folder {path} to continue from {older[-1].name if older else 'the start'}"


def read_part(path: Path, name: str) -> Any:
    """The content of one file of a checkpoint, tensors on the CPU; nothing in it is executed."""
    if name.endswith(".json"):
        return json.loads(read_text(path / name))
    return torch.load(path / name, map_location="cpu", weights_only=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run left half-written or half-removed."""
    for path in folder.glob("checkpoint-*.tmp"):
        shutil.rmtree(path)


def update_of(path: Path) -> int:
    """How many updates a checkpoint's name says were done."""
    return int(path.name.removeprefix("checkpoint-"))


def _write(file: Path, part: Any) -> None:
    with file.open("wb") as handle:
        if isinstance(part, bytes):
            handle.write(part)
        elif file.suffix == ".json":
            handle.write((json.dumps(part, indent=1) + "\n").encode())
        else:
            _save_tensors(part, handle)


def _save_tensors(part: Any, handle: BinaryIO) -> None:
    # An open file, not a path: only then torch's writer meets a full disk as an OSError. Closing its archive it may
    # fail a second time, with an error of its own that hides the first.
    try:
        torch.save(part, handle)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _seal(temporary: Path, begun: Sealed) -> None:
    named = begun | sealed((path for path in temporary.iterdir() if path.is_file()), below=temporary)
    _write(temporary / MANIFEST, dict(sorted(named.items())))
    _sync(temporary / MANIFEST)
    _sync(temporary)


def beside(final: Path) -> Path:
    """Where a checkpoint is written before it is whole."""
    return final.with_name(final.name + ".tmp")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
