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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from rpo.errors import InputError
from rpo.text import read_text

MANIFEST = "manifest.json"
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


def save_checkpoint(
    final: Path, parts: Mapping[str, Any], *, keep: int, extra: Callable[[Path], None] | None = None
) -> None:
    """Write one checkpoint, atomically, and drop the oldest beyond `keep`.

    A checkpoint of this update that is already there is left as it is.

    Args:
        parts: Content per file name: bytes as they are, `.json` as JSON, anything else by `torch.save`.
        extra: Writes further files into the folder it is given; they belong to the checkpoint like the rest.
    """
    if final.exists():
        return
    temporary = final.with_name(final.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, part in parts.items():
            _write(temporary / name, part)
        if extra is not None:
            extra(temporary)
        _seal(temporary)
        os.replace(temporary, final)
        _sync(final.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _explained(error, final, parts) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in checkpoints(final.parent)[:-keep]:
        _remove(old)


def verify_checkpoint(path: Path, *, only: str | None = None) -> None:
    """Check every file of a checkpoint against its manifest."""
    remedy = remedy_for(path)
    named = _read_manifest(path, remedy)
    if only is not None and only not in named:
        raise InputError(f"{path / MANIFEST} does not name {only}; expected every file of a checkpoint: {remedy}")
    for name, expected in named.items() if only is None else [(only, named[only])]:
        file = path / name
        if not file.is_file():
            raise InputError(f"{file} is missing; expected {expected['bytes']} bytes: {remedy}")
        if file.stat().st_size != expected["bytes"]:
            raise InputError(
                f"{file} is truncated: it has {file.stat().st_size} bytes, expected {expected['bytes']}: {remedy}"
            )
        if _sha256(file) != expected["sha256"]:
            raise InputError(f"{file} was altered: expected the content its manifest names: {remedy}")


def _read_manifest(path: Path, remedy: str) -> dict[str, dict[str, Any]]:
    file = path / MANIFEST
    if not file.is_file():
        raise InputError(f"{path} has no {MANIFEST}; expected a complete checkpoint: {remedy}")
    try:
        files = json.loads(read_text(file))
        is_whole = bool(files) and all({"bytes", "sha256"} <= one.keys() for one in files.values())
    except (ValueError, AttributeError):
        is_whole = False
    if not is_whole:
        raise InputError(f"{file} is damaged; expected the sizes and sha256 of the checkpoint's files: {remedy}")
    return files


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


def _seal(temporary: Path) -> None:
    manifest: dict[str, dict[str, int | str]] = {}
    for file in sorted(path for path in temporary.rglob("*") if path.is_file()):
        manifest[file.relative_to(temporary).as_posix()] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        _sync(file)
    _write(temporary / MANIFEST, manifest)
    _sync(temporary / MANIFEST)
    _sync(temporary)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _remove(path: Path) -> None:
    # Renamed first: a kill half-way must not leave something that looks like a checkpoint.
    doomed = path.with_name(path.name + ".tmp")
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def _explained(error: OSError, final: Path, parts: Mapping[str, Any]) -> OSError:
    needed, free = sum(_size(part) for part in parts.values()), shutil.disk_usage(final.parent).free
    kept = checkpoints(final.parent)
    text = (
        f"could not save {final}: {error.strerror or error}; it needs about {needed} bytes and {free} are free: make "
        f"room, then resume from {kept[-1].name if kept else 'the start, as there is no earlier checkpoint'}"
    )
    return OSError(error.errno, text)


def _size(part: Any) -> int:
    if isinstance(part, Tensor):
        return part.numel() * part.element_size()
    if isinstance(part, bytes | str):
        return len(part)
    if isinstance(part, Mapping):
        return sum(_size(value) for value in part.values())
    if isinstance(part, list | tuple):
        return sum(_size(value) for value in part)
    return 8
