"""What made the records of each stage, so that a folder never mixes what was made in two ways.

`manifest.json` has, for each stage, the plain values that decide its results (model, revision, sha256 of the prompt
template, decoding …) and one sha256 of them all. A stage that has no records yet takes the values of the run; any other
refuses values that are not its own.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import final

from filelock import FileLock

from rpo.errors import InputError
from rpo.from_environment import as_written
from rpo.text import read_text, write_text

Identity = Mapping[str, str]

_LAYOUT = 1  # of the folder; written down, so that another layout is refused and not misread


def identity_hash(identity: Identity) -> str:
    """One sha256 of everything that an identity says."""
    return hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, dict[str, str]]:
    """The identity of each stage that a run has begun; empty if there is no run."""
    return _read(folder)[0]


def _read(folder: Path) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Of each stage the identity as it was written, and the sha256 of its values."""
    path = folder / "manifest.json"
    if not path.exists():
        return {}, {}
    try:
        found = json.loads(read_text(path))
        layout, stages = found["layout"], {name: dict(one["identity"]) for name, one in found["stages"].items()}
        hashes = {name: str(one["sha256"]) for name, one in found["stages"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is damaged ({type(error).__name__}: {error}); expected the manifest of a run; restore it, or use "
            "another folder"
        ) from error
    if layout != _LAYOUT:
        raise InputError(f"{path} has layout {layout}; expected {_LAYOUT}; use the version of rpo that wrote it")
    return stages, hashes


@final
class Manifest:
    """The manifest of a folder that this process works on."""

    def __init__(self, folder: Path) -> None:
        """Name the folder; nothing is read yet."""
        self._folder = folder

    def claim(self, identities: Mapping[str, Identity], has_records: Mapping[str, bool]) -> None:
        """Write down what makes each stage, or compare it with what made it before.

        Args:
            identities: Of the stages that this run does, in their order.
        """
        with FileLock(self._folder / "locks" / "manifest.lock"):
            known, hashes = _read(self._folder)
            for stage, identity in identities.items():
                now = identity_hash(identity)
                if stage in known and hashes[stage] != now:
                    if has_records[stage]:
                        raise self._made_otherwise(stage, known[stage], identity, hashes[stage])
                    self._require_none_after(stage, has_records)
                known[stage], hashes[stage] = dict(identity), now
            self._write(known, hashes)

    def _made_otherwise(self, stage: str, old: Identity, new: Identity, old_hash: str) -> InputError:
        kept = as_written(dict(new))
        changed = sorted(key for key in {*old, *new} if old.get(key) != kept.get(key))
        changed = changed or sorted(key for key in new if new[key] != kept[key])  # the environment has another value
        values = "; ".join(f"{key} was {_shown(old, key)} and is {_shown(new, key)}" for key in changed)
        return InputError(
            f"{self._folder}: the records of stage '{stage}' were made otherwise: {values} (sha256 of all settings of "
            f"the stage: {old_hash} and {identity_hash(new)}); expected one way for all records of a run; "
            f"repeat the old setting, use another output folder, or delete the folder '{stage}' and those of the "
            "stages after it to do them again"
        )

    def _require_none_after(self, stage: str, has_records: Mapping[str, bool]) -> None:
        stages = list(has_records)
        for later in stages[stages.index(stage) + 1 :]:
            if has_records[later]:
                raise InputError(
                    f"{self._folder}: stage '{stage}' is to be done anew with other settings, but '{later}' still has "
                    f"records that came of the old ones; expected none; delete the folder '{later}', too"
                )

    def _write(self, stages: Mapping[str, Identity], hashes: Mapping[str, str]) -> None:
        rows = {name: {"identity": as_written(dict(one)), "sha256": hashes[name]} for name, one in stages.items()}
        partial = self._folder / ".manifest.json.partial"
        write_text(partial, json.dumps({"layout": _LAYOUT, "stages": rows}, indent=2, ensure_ascii=False) + "\n")
        os.replace(partial, self._folder / "manifest.json")


def _shown(identity: Identity, key: str) -> str:
    return repr(identity[key]) if key in identity else "not set"
