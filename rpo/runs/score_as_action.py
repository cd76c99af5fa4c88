"""A score-as-action run from a file, as `rpo train score-as-action` does it."""

from dataclasses import field
from typing import TYPE_CHECKING

from rpo.runs.online_config import OnlineRunConfig
from rpo.settings import settings
from rpo.trainers.score_as_action_config import ScoreAsActionConfig

if TYPE_CHECKING:
    from rpo.runs.online import RunResult


@settings
class RunConfig(OnlineRunConfig):
    """A whole run: `rpo train score-as-action CONFIG key=value …`."""

    score_as_action: ScoreAsActionConfig = field(default_factory=ScoreAsActionConfig)
    """The training."""


def run(config: RunConfig, *, resume: bool = False) -> "RunResult":
    """Load, train, save, report."""
    # Not at the top: the command line describes the settings before anything has loaded.
    from rpo.runs.online import run_online
    from rpo.trainers.score_as_action import ScoreAsActionTrainer

    return run_online(config, config.score_as_action, ScoreAsActionTrainer, resume=resume)
