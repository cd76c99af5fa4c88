"""What the online runs from a file are made of, but for the training itself."""

from dataclasses import field

from rpo.models.config import ModelConfig
from rpo.ranges import Text, Weights, WholeNumber
from rpo.settings import settings


@settings
class OnlineRunConfig:
    """A run that draws what it learns from, but for the training itself."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The checkpoint."""

    prompts: Text = "shapes"
    """What images are drawn of: a text file with one prompt per line, a .jsonl file whose lines have a "prompt", or
    "shapes" for the training prompts of the embedded world."""

    rewards: Weights = field(default_factory=lambda: {"shapes": 1.0})
    """What images are worth: names of rewards, or package.module:attribute, each with its weight."""

    report: bool = True
    """Whether to write `report.html` at the end."""

    evaluate_images: WholeNumber = 160
    """Held-out prompts of each domain of which base and aligned model draw one image each for the report; only with the
    model "shapes", whose verifier can judge them. 0 leaves it out."""

    output: Text | None = None
    """The run's folder, in the place of the training's `folder`."""
