"""The folder of a run: everything that was found out, in files that survive being killed at any moment.

    manifest.json                what made each stage's records
    images/<sha256>.png          every image, named by its content
    sources/part-0.jsonl …       one line per record and stage, one file per process

An image is in place, whole, before a line names it. No line holds a time or a duration, so that an undisturbed run and
a killed one write the same lines, be it in another order.
"""

import hashlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, final, get_args

import numpy as np
from PIL.Image import Image

from rpo.curation.manifest import Identity, Manifest, read_manifest
from rpo.curation.parts import StageRecords
from rpo.curation.share import Share, ShareLock
from rpo.data.pixels import decode_image
from rpo.data.preference import encode_png
from rpo.errors import InputError
from rpo.files import name_full_disk

StageName = Literal["sources", "critiques", "instructions", "edits", "scores", "decisions"]
"""The folders of the stages."""

STAGES: tuple[StageName, ...] = get_args(StageName)


@final
class RunFolder:
    """A run's folder, for reading, or with a share of its records for writing.

    Attributes:
        path: The folder.
        stages: The records of each stage.
        share: What this process writes; None for reading.
    """

    def __init__(self, path: str | Path, share: Share | None = None) -> None:
        """Open the folder; with a share, it is created and the share is locked."""
        self.path = Path(path)
        self.share = share
        self._lock = None
        if share is not None:
            (self.path / "images").mkdir(parents=True, exist_ok=True)
            self._lock = ShareLock(self.path / "locks", share)
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
        """Let go of the share."""
        if self._lock is not None:
            self._lock.close()

    def claim(self, identities: Mapping[StageName, Identity]) -> None:
        """Write down what makes the records of each stage.

        Args:
            identities: Of the stages that this run does, in their order.
        """
        has_records = {str(stage): len(records) > 0 for stage, records in self.stages.items()}
        Manifest(self.path).claim({str(stage): one for stage, one in identities.items()}, has_records)

    def identity_of(self, stage: StageName) -> Identity:
        """What made the records of a stage; empty if it was not begun."""
        return read_manifest(self.path).get(stage, {})

    def save_image(self, image: Image) -> str:
        """Keep an RGB image, and return the sha256 that it is called by."""
        data = encode_png(np.asarray(image))
        digest = hashlib.sha256(data).hexdigest()
        path = self.image_path(digest)
        if not path.exists():
            partial = path.with_name(f".{digest}.{os.getpid()}.{threading.get_ident()}.partial")
            try:
                partial.write_bytes(data)
                partial.replace(path)
            except OSError as error:
                partial.unlink(missing_ok=True)
                raise name_full_disk(error, path) from error
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
