"""A Diffusion-DPO run from a file, as `rpo train dpo` and the examples do it: checkpoint, pairs, settings."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rpo.config import to_yaml
from rpo.errors import InputError
from rpo.models.config import ModelConfig, load_model
from rpo.ranges import Count, Text
from rpo.settings import settings
from rpo.text import write_text
from rpo.trainers.dpo_config import DPOConfig

if TYPE_CHECKING:
    from rpo.training.loop import TrainResult


@settings
class DataConfig:
    """Which preference pairs are trained on."""

    source: str = ""
    """Folder, .jsonl or parquet file, or the id of a data set on the hub; see `rpo data check`."""

    split: Text = "train"
    """Of a data set with several."""

    limit: Count | None = None
    """At most this many rows are read; nothing means all."""

    streaming: bool = False
    """Fetch only the rows that are needed, `limit` of them, and keep them in the local cache."""

    allow_size_mismatch: bool = False
    """Accept pairs of images of different sizes (Pick-a-Pic has them); each is cropped at its own centre."""

    skip_faulty: bool = False
    """Leave out and count records that are not sound, instead of ending the run; for sets of the size of Pick-a-Pic."""


@settings
class RunConfig:
    """A whole run: `rpo train dpo CONFIG key=value …`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The checkpoint."""

    data: DataConfig = field(default_factory=DataConfig)
    """The pairs."""

    dpo: DPOConfig = field(default_factory=DPOConfig)
    """The training."""

    output: Text | None = None
    """The run's folder; the same as `dpo.folder`."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended, and where its result is."""

    trained: "TrainResult"
    saved: Path


def run(config: RunConfig, *, resume: bool = False) -> RunResult:
    """Load, train, save."""
    # Not at the top: the command line describes the settings before anything has loaded.
    from rpo.data.readers import read_pairs
    from rpo.trainers.dpo import DPOTrainer
    from rpo.training.processes import Processes
    from rpo.training.resume import refuse_used

    if not config.data.source:
        raise InputError("data.source is empty; give a folder, file or data set of preference pairs: data.source=PATH")
    dpo = replace(config.dpo, folder=config.output) if config.output else config.dpo
    if not resume:
        refuse_used(Path(dpo.folder))
    pairs = read_pairs(
        config.data.source,
        split=config.data.split,
        limit=config.data.limit,
        streaming=config.data.streaming,
        allow_size_mismatch=config.data.allow_size_mismatch,
        skip_faulty=config.data.skip_faulty,
    )
    trainer = DPOTrainer(load_model(config.model), pairs, dpo)
    with trainer.claim(resume=resume):
        if Processes().is_main:
            write_text(trainer.folder / "run.yaml", to_yaml(config))
        return RunResult(trainer.train(resume=resume), trainer.save())
