"""A GRPO or DDPO run from a file, as `rpo train grpo` does it."""

from dataclasses import field
from typing import TYPE_CHECKING

from rpo.runs.online_config import OnlineRunConfig
from rpo.settings import settings
from rpo.trainers.grpo_config import GRPOConfig

if TYPE_CHECKING:
    from rpo.runs.online import RunResult


@settings
class RunConfig(OnlineRunConfig):
    """A whole run: `rpo train grpo CONFIG key=value …`."""

    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    """The training."""


def run(config: RunConfig, *, resume: bool = False) -> "RunResult":
    """Load, train, save, report."""
    # Not at the top: the command line describes the settings before anything has loaded.
    from rpo.runs.online import run_online
    from rpo.trainers.grpo import GRPOTrainer

    return run_online(config, config.grpo, GRPOTrainer, resume=resume)
