"""The folder of a run: everything that was found out, in files that survive being killed at any moment.

    manifest.json                what made each stage's records
    images/<sha256>.png          every image, named by its content
    sources/part-0.jsonl …       one line per record and stage, one file per process

An image is in place, whole, before a line names it. No line holds a time or a duration, so that an undisturbed run and
a killed one write the same lines, be it in another order.

Process i of n does the records whose group, read as a number, leaves the remainder i when divided by n; so processes
need not talk to each other, and may be on several machines with one file system. A process holds its part alone, and
while it runs no other split of the same folder may run: 1 of 2 and 1 of 3 have records in common.
"""

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final, get_args

import numpy as np
from filelock import FileLock
from PIL.Image import Image

from rpo.curation.store.shards import StageRecords
from rpo.data.pixels import decode_image
from rpo.data.preference import encode_png
from rpo.errors import InputError
from rpo.files.lock import is_taken, taken
from rpo.files.text import read_text
from rpo.files.whole import write_whole, written_whole
from rpo.from_environment import as_written

StageName = Literal["sources", "critiques", "instructions", "edits", "scores", "decisions"]
"""The folders of the stages."""

STAGES: tuple[StageName, ...] = get_args(StageName)

Identity = Mapping[str, str]
"""The plain values that decide the results of a stage: model, revision, sha256 of the prompt template, decoding …"""

_LAYOUT = 1  # of the folder; written down, so that another layout is refused and not misread


@dataclass(frozen=True)
class Share:
    """Part `index` of `count`.

    Example:
        >>> Share(1, 4).owns("0000000000000005")
        True
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        """Refuse a part that there is not."""
        if not 0 <= self.index < self.count:
            raise InputError(
                f"part {self.index} of {self.count}; expected 0 to {max(self.count - 1, 0)} of at least 1; with 4 "
                "processes the parts are 0/4, 1/4, 2/4 and 3/4"
            )

    def owns(self, group: str) -> bool:
        """Whether the records of a group are this share's."""
        return int(group, 16) % self.count == self.index


def share_of(part: str, environment: Mapping[str, str]) -> Share:
    """The share that a configuration asks for, or else the one that torchrun or accelerate gave this process.

    Args:
        part: "0/4" for the first of four; empty to look into the environment.
    """
    if not part:
        return Share(int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1")))
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    if not found:
        raise InputError(f"part is {part!r}; expected INDEX/COUNT; write part=0/4 for the first of four")
    return Share(int(found[1]), int(found[2]))


@final
class RunFolder:
    """A run's folder, for reading, or with a share of its records for writing.

    Attributes:
        path: The folder.
        stages: The records of each stage.
        answers: Folder of what models answered.
        share: What this process writes; None for reading.
    """

    def __init__(self, path: str | Path, share: Share | None = None) -> None:
        """Open the folder; with a share, it is created and the share is locked."""
        self.path = Path(path)
        self.share = share
        self.answers = self.path / "answers"
        self._held, self._saving = ExitStack(), threading.Lock()
        self._is_new = not self.path.exists()
        if share is not None:
            (self.path / "images").mkdir(parents=True, exist_ok=True)
            self._take(self.path / "locks", share)
        elif not (self.path / "manifest.json").is_file():
            raise InputError(
                f"{self.path} holds no run of curation; expected a folder with manifest.json; give the output folder "
                "of `rpo curate`"
            )
        try:
            own = None if share is None else share.index
            # The last stage first: of a run at work, whatever a line builds on is then read as well.
            found = {stage: StageRecords(self.path / stage, own) for stage in reversed(STAGES)}
            self.stages: dict[StageName, StageRecords] = {stage: found[stage] for stage in STAGES}
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the share, as the system does when the process dies; nothing is left of a run that was refused."""
        self._held.close()
        is_sole = self._is_new and self.share == Share()
        if is_sole and all(found.is_dir() or found.parent.name == "locks" for found in self.path.rglob("*")):
            shutil.rmtree(self.path, ignore_errors=True)

    def claim(self, identities: Mapping[StageName, Identity]) -> None:
        """Write down what makes the records of each stage, or compare it with what made them before.

        A folder never mixes what was made in two ways: a stage that has no records yet takes the values of the run, any
        other refuses values that are not its own.

        Args:
            identities: Of the stages that this run does, in their order.
        """
        with FileLock(self.path / "locks" / "manifest.lock"):
            known = self._manifest()
            for stage, identity in identities.items():
                old, old_hash = known.get(stage, ({}, ""))
                if old_hash and old_hash != identity_hash(identity):
                    if self.stages[stage]:
                        raise self._made_otherwise(stage, old, identity, old_hash)
                    self._require_none_after(stage)
                known[stage] = dict(identity), identity_hash(identity)
            rows = {stage: {"identity": as_written(one), "sha256": digest} for stage, (one, digest) in known.items()}
            text = json.dumps({"layout": _LAYOUT, "stages": rows}, indent=2, ensure_ascii=False)
            write_whole(self.path / "manifest.json", text + "\n")

    def identities(self) -> dict[str, Identity]:
        """What made the records of each stage that was begun."""
        return {stage: identity for stage, (identity, _) in self._manifest().items()}

    def identity_of(self, stage: StageName) -> Identity:
        """What made the records of a stage; empty if it was not begun."""
        return self.identities().get(stage, {})

    def save_image(self, image: Image) -> str:
        """Keep an RGB image, and return the sha256 that it is called by."""
        data = encode_png(np.asarray(image))
        digest = hashlib.sha256(data).hexdigest()
        path = self.image_path(digest)
        with self._saving:
            if not path.exists():
                with written_whole(path) as partial:
                    partial.write_bytes(data)
        return digest

    def image_path(self, digest: str) -> Path:
        """Where an image is kept."""
        return self.path / "images" / f"{digest}.png"

    def load_image(self, digest: str, record: str) -> Image:
        """The pixels of an image."""
        path = self.image_path(digest)
        name = f"{record}: the image {path}"
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise InputError(
                f"{name} does not exist; expected every image that a record names; restore it, or use another folder"
            ) from error
        return decode_image(data, name).image

    def _take(self, folder: Path, share: Share) -> None:
        """Hold a share until the folder is closed."""
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "gate.lock"):
            for other in sorted(folder.glob("part-*-of-*.lock")):
                count = other.stem.rpartition("-")[2]
                if count != str(share.count) and is_taken(other):
                    raise InputError(
                        f"processes that share {self.path} in {count} parts are at work, and part {share.index} of "
                        f"{share.count} has records in common with theirs; expected one number of parts at a time; "
                        "wait until they have ended"
                    )
            self._held.enter_context(
                taken(
                    folder / f"part-{share.index}-of-{share.count}.lock",
                    f"part {share.index} of {share.count} of {self.path} is in use",
                    "wait until it has ended, or give each process a part of its own: part=0/2 and part=1/2",
                )
            )

    def _manifest(self) -> dict[str, tuple[dict[str, str], str]]:
        """Of each stage the identity as it was written, and the sha256 of its values."""
        path = self.path / "manifest.json"
        if not path.exists():
            return {}
        try:
            found = json.loads(read_text(path))
            layout = found["layout"]
            stages = {name: (dict(one["identity"]), str(one["sha256"])) for name, one in found["stages"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path} is damaged ({type(error).__name__}: {error}); expected the manifest of a run; restore it, or "
                "use another folder"
            ) from error
        if layout != _LAYOUT:
            raise InputError(f"{path} has layout {layout}; expected {_LAYOUT}; use the version of rpo that wrote it")
        return stages

    def _made_otherwise(self, stage: StageName, old: Identity, new: Identity, old_hash: str) -> InputError:
        kept = as_written(dict(new))
        changed = sorted(key for key in {*old, *new} if old.get(key) != kept.get(key))
        changed = changed or sorted(key for key in new if new[key] != kept[key])  # the environment has another value
        values = "; ".join(f"{key} was {_shown(old, key)} and is {_shown(new, key)}" for key in changed)
        return InputError(
            f"{self.path}: the records of stage '{stage}' were made otherwise: {values} (sha256 of all settings of "
            f"the stage: {old_hash} and {identity_hash(new)}); expected one way for all records of a run; "
            f"repeat the old setting, use another output folder, or delete the folder '{stage}' and those of the "
            "stages after it to do them again"
        )

    def _require_none_after(self, stage: StageName) -> None:
        for later in STAGES[STAGES.index(stage) + 1 :]:
            if self.stages[later]:
                raise InputError(
                    f"{self.path}: stage '{stage}' is to be done anew with other settings, but '{later}' still has "
                    f"records that came of the old ones; expected none; delete the folder '{later}', too"
                )


def identity_hash(identity: Identity) -> str:
    """One sha256 of everything that an identity says."""
    return hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()


def _shown(identity: Identity, key: str) -> str:
    return repr(identity[key]) if key in identity else "not set"
