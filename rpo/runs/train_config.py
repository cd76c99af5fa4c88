"""The whole settings of a run from a file: those of the algorithm, the checkpoint, the data, and how it is judged."""

from dataclasses import field, fields
from typing import ClassVar, TypeVar

from rpo.config.ranges import Count, Text, Weights
from rpo.config.settings import settings
from rpo.evaluation.held_out import HeldOutConfig
from rpo.models.config import ModelConfig
from rpo.trainers.dpo_config import DPOConfig
from rpo.trainers.endpoint_config import EndpointConfig
from rpo.trainers.grpo_config import GRPOConfig
from rpo.trainers.reward_gradient_config import RewardGradientConfig
from rpo.trainers.score_as_action_config import ScoreAsActionConfig

Config = TypeVar("Config")

AT_THE_TOP = "what was in this section stands at the top now; leave its name out"
JUDGED = "it is held_out.count now"


@settings
class DataConfig:
    """Which preference pairs are trained on."""

    source: str = ""
    """Folder or file (.jsonl, .csv, .json, .tar, parquet) of pairs, or the id of a data set on the hub; see
    `rpo data check`."""

    split: Text = "train"
    """Of a set with several."""

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
    """What every run has beside the algorithm's own settings."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The checkpoint."""

    held_out: HeldOutConfig | None = None
    """What base and aligned model are compared on at the end; nothing leaves it out."""

    report: bool = True
    """Whether to write `report.html` at the end."""


@settings
class RewardRunConfig(RunConfig):
    """What every run has that learns from a reward."""

    prompts: Text = "shapes"
    """What images are drawn of: a text file with one prompt per line, a .jsonl file whose lines have a "prompt", or
    "shapes" for the training prompts of the embedded world."""

    rewards: Weights = field(default_factory=lambda: {"shapes": 1.0})
    """What images are worth: names of rewards, package.module:attribute, or the address of one that is served
    (http://HOST:PORT/NAME), each with its weight."""


@settings
class DPORunConfig(RunConfig, DPOConfig):
    """A whole run: `rpo train dpo CONFIG key=value …`."""

    renamed: ClassVar[dict[str, str]] = {**DPOConfig.renamed, "dpo": AT_THE_TOP}

    data: DataConfig = field(default_factory=DataConfig)
    """The pairs."""


@settings
class GRPORunConfig(RewardRunConfig, GRPOConfig):
    """A whole run: `rpo train grpo CONFIG key=value …`."""

    renamed: ClassVar[dict[str, str]] = {**GRPOConfig.renamed, "grpo": AT_THE_TOP, "evaluate_images": JUDGED}


@settings
class ScoreAsActionRunConfig(RewardRunConfig, ScoreAsActionConfig):
    """A whole run: `rpo train score-as-action CONFIG key=value …`."""

    renamed: ClassVar[dict[str, str]] = {
        **ScoreAsActionConfig.renamed,
        **{name: "it belongs to `rpo train endpoint` now" for name in ("bound_clip", "consistency")},
        "score_as_action": AT_THE_TOP,
        "evaluate_images": JUDGED,
    }


@settings
class EndpointRunConfig(RewardRunConfig, EndpointConfig):
    """A whole run: `rpo train endpoint CONFIG key=value …`."""


@settings
class RewardGradientRunConfig(RewardRunConfig, RewardGradientConfig):
    """A whole run: `rpo train reward-gradient CONFIG key=value …`."""


def part_of(config: object, part: type[Config]) -> Config:
    """The settings of a class among those of a class that has them all."""
    return part(**{one.name: getattr(config, one.name) for one in fields(part)})  # pyright: ignore[reportArgumentType]
