"""What an online run consists of, as far as it is the same for every trainer, and what that comes to per update."""

from pathlib import Path
from typing import Any

from rpo.errors import InputError
from rpo.ranges import Seed, WholeNumber
from rpo.settings import settings
from rpo.trainers.online_config import AdapterConfig, LearningConfig, RolloutConfig
from rpo.training.loop_config import LoopConfig


@settings
class OnlineSettings:
    """The part of a trainer's configuration that every online trainer has, and the whole of it for the record."""

    rollout: RolloutConfig
    learning: LearningConfig
    adapter: AdapterConfig
    loop: LoopConfig
    preview_every: WholeNumber
    folder: Path
    seed: Seed
    whole: Any
    """The trainer's own configuration, a dataclass."""
    skips_clean_end: bool
    """Whether a last step to perfectly clean data cannot be learnt: the DDIM step adds no noise to it."""
    has_ratio: bool
    """Whether what is learnt from are the rollout's own steps, whose likelihood can be compared."""
    method: str
    """What a person calls it."""
    preflight: bool
    """Whether a few checks come before the first update."""

    @property
    def evidence(self) -> Path:
        """Where the images behind a failing reward are put."""
        return self.folder / "failed_reward"


def division(settings: OnlineSettings, processes: int, trained_steps: int) -> tuple[int, int]:
    """(points per micro-batch, micro-batches per update and process)."""
    rollout, learning = settings.rollout, settings.learning
    images = rollout.images // processes
    if learning.keep_graph:
        size = min(rollout.batch_size, images)
        if images % size:
            raise InputError(
                f"rollout.batch_size is {rollout.batch_size} with keep_graph, but {images} images per process are "
                "drawn; give a divisor of that"
            )
        return size, trained_steps * (images // size)
    points = images * trained_steps
    per_update, rest = divmod(points, learning.minibatches)
    if rest:
        raise InputError(
            f"a rollout gives {points} points per process ({images} images × {trained_steps} trained steps), which "
            f"learning.minibatches={learning.minibatches} does not divide; use a divisor of {points}"
        )
    size = next(n for n in range(min(learning.micro_batch, per_update), 0, -1) if per_update % n == 0)
    return size, per_update // size
