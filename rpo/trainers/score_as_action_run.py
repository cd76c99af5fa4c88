"""A score-as-action run from a file, as `rpo train score-as-action` does it: checkpoint, prompts, rewards."""

from collections.abc import Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rpo.config import to_yaml
from rpo.models.config import ModelConfig, load_model
from rpo.prompt_source import SHAPES, read_prompts
from rpo.ranges import Weight, WholeNumber
from rpo.settings import settings
from rpo.trainers.score_as_action_config import ScoreAsActionConfig

if TYPE_CHECKING:
    from rpo.trainers.online_run import RunResult


@settings
class RunConfig:
    """A whole run: `rpo train score-as-action CONFIG key=value …`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The checkpoint."""

    prompts: str = SHAPES
    """What images are drawn of: a text file with one prompt per line, a .jsonl file whose lines have a "prompt", or
    "shapes" for the training prompts of the embedded world."""

    rewards: Mapping[str, Weight] = field(default_factory=lambda: {"shapes": 1.0})
    """What images are worth: names of rewards, or package.module:attribute, each with its weight."""

    score_as_action: ScoreAsActionConfig = field(default_factory=ScoreAsActionConfig)
    """The training."""

    report: bool = True
    """Whether to write `report.html` at the end."""

    evaluate_images: WholeNumber = 160
    """Held-out prompts of each domain of which base and aligned model draw one image each for the report; only with the
    model "shapes", whose verifier can judge them. 0 leaves it out."""

    output: str | None = None
    """The run's folder; the same as `score_as_action.folder`."""


def run(config: RunConfig, *, resume: bool = False) -> "RunResult":
    """Load, train, save, report.

    Args:
        config: The run.
        resume: Continue a killed run of the same folder.

    Raises:
        ValueError: If the checkpoint, the prompts, the rewards or the settings cannot be used; says which and why.
    """
    # Not at the top: the command line describes the settings before anything has loaded.
    from rpo.trainers.online_run import train_and_report
    from rpo.trainers.score_as_action import ScoreAsActionTrainer
    from rpo.training.resume import refuse_used

    settings = replace(config.score_as_action, folder=config.output) if config.output else config.score_as_action
    if not resume:
        refuse_used(Path(settings.folder))
    prompts = read_prompts(config.prompts, seed=settings.seed)
    trainer = ScoreAsActionTrainer(load_model(config.model), config.rewards, prompts, settings)
    return train_and_report(
        trainer,
        source=config.model.source,
        settings=to_yaml(config),
        resume=resume,
        report=config.report,
        evaluate_images=config.evaluate_images,
    )
